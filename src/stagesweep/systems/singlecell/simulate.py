"""Simulated cohort of patients and their cells, to run every part of the system without a file.

Nothing here is measured. The names of genes, types and donors say that they are simulated.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from stagesweep.base.errors import UserError
from stagesweep.systems.singlecell.data.dataset import Columns, SingleCell
from stagesweep.systems.singlecell.data.h5ad import CountTable, IntArray

Values = NDArray[np.float64]
CONDITIONS = ("control", "disease")
CHUNK_SIZE = 2048


@dataclass
class Cohort:
    """Simulator of patients with one of two conditions, and their cells of several types.

    Counts are negative binomial. The mean of a gene in a cell is the library size (log-normal,
    `depth` on average) times the share of the gene. The share is a product of the strength of the
    gene, the cell type (a tenth of the genes, by about e^`contrast`; types come in pairs that share
    half of their markers), the disease (`effect`; a twentieth of the genes, in half of the types),
    the batch (`batch_effect`) and the donor (half of that). Type proportions depend on the
    condition, with a Dirichlet draw (concentration 50) for each donor. `seed` determines the whole
    cohort.
    """

    donors: int
    cells: int
    genes: int
    types: int
    batches: int
    depth: float
    contrast: float
    effect: float
    batch_effect: float
    seed: int

    def __post_init__(self) -> None:
        """Draw the parameters of the cohort; raises UserError for invalid sizes."""
        if min(self.cells, self.genes, self.types, self.batches) < 1 or self.donors < 2:
            raise UserError(
                "a cohort needs at least 2 donors, and at least 1 cell, gene, type and batch"
            )
        random = self.random = np.random.default_rng(self.seed)
        g, k, d = self.genes, self.types, self.donors
        self.strength = random.lognormal(0, 2.0, g)
        family = self._markers(random, (k + 1) // 2)[np.arange(k) // 2]
        self.of_type = self.contrast * (0.5 * family + 0.5 * self._markers(random, k))
        diseased = (random.random((k, g)) < 0.05) * (np.arange(k) % 2 == 0)[:, None]
        self.of_disease = self.effect * diseased * random.normal(0, 1, (k, g))
        self.of_batch = random.normal(0, self.batch_effect, (self.batches, g))
        self.of_donor = random.normal(0, self.batch_effect / 2, (d, g))
        self.theta = random.lognormal(1.0, 0.5, g)
        self.condition = random.permutation(np.arange(d) % 2)
        self.batch = random.permutation(np.arange(d) % self.batches)
        healthy = random.dirichlet(np.full(k, 3.0))
        shifted = healthy * np.exp(self.effect * random.normal(0, 0.7, k))
        mixtures = np.stack([healthy, shifted / shifted.sum()])
        self.mixture = np.stack([random.dirichlet(50 * mixtures[c] + 0.2) for c in self.condition])

    def _markers(self, random: np.random.Generator, k: int) -> Values:
        chosen = random.random((k, self.genes)) < 0.1
        return chosen * random.normal(1.0, 0.6, (k, self.genes))

    def draw(self) -> Iterator[tuple[csr_matrix, pd.DataFrame]]:
        """Iterate over counts and annotation of cells, donor by donor, at most 2,048 at a time."""
        for donor in range(self.donors):
            for start in range(0, self.cells, CHUNK_SIZE):
                n = min(CHUNK_SIZE, self.cells - start)
                kinds = self.random.choice(self.types, n, p=self.mixture[donor])
                yield csr_matrix(self._counts(donor, kinds)), self._obs(donor, kinds, start)

    def _counts(self, donor: int, kinds: IntArray) -> NDArray[np.float32]:
        """Draw counts (n, g) of a donor's cells of the types `kinds` (n,)."""
        profile = self.of_type + self.of_disease * self.condition[donor]
        shift = self.of_batch[self.batch[donor]] + self.of_donor[donor]
        share = self.strength * np.exp(profile + shift)
        share /= share.sum(axis=1, keepdims=True)
        library = self.random.lognormal(np.log(self.depth) - 0.08, 0.4, len(kinds))
        mean = share[kinds] * library[:, None]
        rate = self.random.standard_gamma(np.broadcast_to(self.theta, mean.shape))
        counts: NDArray[np.float32] = self.random.poisson(rate / self.theta * mean)
        return counts.astype(np.float32)

    def _obs(self, donor: int, kinds: IntArray, start: int) -> pd.DataFrame:
        names = [f"simulated-{donor:03d}-{start + n:06d}" for n in range(len(kinds))]
        return pd.DataFrame(
            {
                "cell_type": [f"simulated type {kind + 1:02d}" for kind in kinds],
                "donor": f"simulated donor {donor + 1:03d}",
                "condition": CONDITIONS[self.condition[donor]],
                "batch": f"simulated batch {self.batch[donor] + 1}",
            },
            index=names,
        )

    @property
    def names(self) -> list[str]:
        """Names of the genes."""
        return [f"Simulated{number:05d}" for number in range(self.genes)]

    def table(self) -> CountTable:
        """Return all cells as a table in memory."""
        counts, obs = zip(*self.draw(), strict=True)
        return CountTable("the simulated cohort", self.names, pd.concat(obs), vstack(counts, "csr"))


def simulated_cohort(
    donors: int = 24,
    cells: int = 200,
    genes: int = 1000,
    types: int = 8,
    batches: int = 3,
    depth: float = 800.0,
    contrast: float = 1.0,
    effect: float = 0.5,
    batch_effect: float = 0.15,
    seed: int = 0,
    min_cells: int = 3,
    min_genes: int = 1,
    variable: int | None = None,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    split_by: str = "auto",
    split_seed: int = 0,
) -> SingleCell:
    """Simulate a cohort of `donors` with `cells` each, and prepare it like one from a file."""
    cohort = Cohort(
        donors, cells, genes, types, batches, depth, contrast, effect, batch_effect, seed
    )
    return SingleCell(
        cohort.table(),
        Columns("cell_type", "donor", "condition", "batch"),
        min_cells=min_cells,
        min_genes=min_genes,
        variable=variable,
        fractions=fractions,
        split_by=split_by,
        split_seed=split_seed,
    )
