"""Stage that mixes the cells of a donor into pseudobulks of known composition."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.data.derived import Columns, DerivedData
from stagesweep.data.labels import label_names

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
BATCH_SIZE = 4096
SPLITS = ("train", "val", "test")


@dataclass
class Pseudobulk:
    """Simulate pseudobulks: `n_samples` mixtures of `n_cells` cells of each donor, as in TAPE (Chen
    et al. 2022).

    Proportions of the donor's types are Dirichlet(1). In a share `sparse` of the mixtures each type
    is missing with probability one half; at least one type remains. Cells are drawn with
    replacement from one donor (and condition) of one split.

    Saves the data ``pseudobulk`` with the columns `counts` (n, g), summed over cells; `expression`
    (n, g), log1p of counts per million; `proportions` (n, k) of types among the drawn cells;
    `types` (n, k), the types that are present; `states` (n, k, d), the mean latent of the cells of
    each type; `communication` (n, k (k-1) / 2), for each pair of types the product of their
    proportions times the cosine of their states, which is large if both are common and similar;
    `pairs`, the pairs of types that the donor has. Values of absent types are 0, and masked by
    `types` and `pairs`. `donor`, `patient` (a donor in one condition) and `condition` are codes.
    """

    part: str | None = None
    label: str = "label"
    n_samples: int = 10
    n_cells: int = 500
    sparse: float = 0.5

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the number of pseudobulks of each split."""
        names = label_names(run.data, self.label)
        missing = {"donor", "condition"} - set(run.data.spec.labels)
        if missing:
            raise UserError(
                f"stage.{run.stage} mixes cells by donor and condition, and the data has no "
                f"{missing.pop()}; name its column: data.columns"
            )
        random = np.random.default_rng(run.seed)
        mixtures = {split: self.mix(run, split, len(names), random) for split in SPLITS}
        genes = run.data.spec.features["counts"].names
        width = mixtures["train"]["states"].shape[2]
        pairs = tuple(f"{a} + {b}" for a, b in combinations(names, 2))
        states = tuple(f"{name} {number}" for name in names for number in range(width))
        features = {
            "counts": Features(genes, low=0.0, unit="count"),
            "expression": Features(genes, low=0.0, unit="log1p CPM"),
            "proportions": Features(tuple(names), low=0.0, high=1.0),
            "states": Features(states),
            "communication": Features(pairs),
        }
        labels = {"condition": run.data.spec.labels["condition"]}
        known = {"condition": label_names(run.data, "condition")}
        run.save_data("pseudobulk", DerivedData(Spec(features, labels=labels), mixtures, known))
        return {f"{split}_pseudobulks": float(len(own["donor"])) for split, own in mixtures.items()}

    def mix(self, run: "Context", split: str, types: int, random: np.random.Generator) -> Columns:
        """Return the columns of the pseudobulks of a split."""
        cells = run.predict(split, ["mean", self.label, "donor", "condition"])
        keys = np.stack([cells["donor"], cells["condition"]], 1)
        patients, patient = np.unique(keys, axis=0, return_inverse=True)
        drawn: list[Array] = []
        sources: list[int] = []  # the patient of each pseudobulk
        for number in range(len(patients)):
            members = [
                np.flatnonzero((patient == number) & (cells[self.label] == kind))
                for kind in range(types)
            ]
            if any(map(len, members)):
                drawn += [self.draw_cells(members, random) for _ in range(self.n_samples)]
                sources += [number] * self.n_samples
        rows = np.repeat(np.arange(len(drawn)), self.n_cells)
        shape = (len(drawn), len(patient))
        weights = csr_matrix((np.ones(len(rows)), (rows, np.concatenate(drawn))), shape)
        donor, condition = patients[sources].T
        kinds = run.data.spec.labels["condition"] + 1
        names = [f"{split}-{run.data.label_names['donor'][d]}-{n:05d}" for n, d in enumerate(donor)]
        present = np.zeros((len(patients), types), bool)
        known = cells[self.label] >= 0
        present[patient[known], cells[self.label][known]] = True
        return {
            **self.expression(run, split, weights),
            **mixture_columns(weights, cells[self.label], cells["mean"], present[sources]),
            "donor": donor,
            "condition": condition,
            "patient": kinds * donor + condition + 1,
            "id": np.array(names),
        }

    def draw_cells(self, members: list[Array], random: np.random.Generator) -> Array:
        """Draw the rows (n_cells,) of one mixture; `members` are the rows of each type."""
        present = np.flatnonzero([len(rows) for rows in members])
        if random.random() < self.sparse:
            kept = random.random(len(present)) < 0.5
            kept[random.integers(len(present))] = True
            present = present[kept]
        counts = random.multinomial(self.n_cells, random.dirichlet(np.ones(len(present))))
        rows = [random.choice(members[k], n) for k, n in zip(present, counts, strict=True)]
        return np.concatenate(rows)

    def expression(self, run: "Context", split: str, weights: csr_matrix) -> Columns:
        """Return summed counts and expression of the mixtures `weights` (n, cells), in batches."""
        genes = len(run.data.spec.features["counts"].names)
        counts, start = np.zeros((weights.shape[0], genes)), 0
        columns = weights.tocsc()
        for batch in self.batches(run, split):
            size = len(batch)
            counts += columns[:, start : start + size] @ batch
            start += size
        expression = np.log1p(counts * (1e6 / np.maximum(counts.sum(1, keepdims=True), 1)))
        return {"counts": counts.astype(np.float32), "expression": expression.astype(np.float32)}

    def batches(self, run: "Context", split: str) -> Iterator[Array]:
        """Iterate over the counts (B, g) of a split, in order."""
        for batch in run.view(split).batches(BATCH_SIZE):
            yield batch["counts"].cpu().numpy()

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {f"{split}_pseudobulks" for split in SPLITS}


def mixture_columns(weights: csr_matrix, label: Array, mean: Array, present: Array) -> Columns:
    """Return proportions, states and communication of mixtures.

    `weights` (n, cells) is how often each cell was drawn, `label` (cells,) its type and `mean`
    (cells, d) its latent mean; `present` (n, k) are the types of the donors.
    """
    n, types = present.shape
    counts, states = np.zeros((n, types)), np.zeros((n, types, mean.shape[1]))
    for kind in range(types):
        own = weights[:, label == kind]
        counts[:, kind] = np.asarray(own.sum(1)).ravel()
        states[:, kind] = own @ mean[label == kind] / np.maximum(counts[:, [kind]], 1)
    proportions = counts / counts.sum(1, keepdims=True)
    first, second = np.array(list(combinations(range(types), 2)), int).reshape(-1, 2).T
    lengths = np.linalg.norm(states, axis=2)
    cosine = (states[:, first] * states[:, second]).sum(2)
    cosine /= np.maximum(lengths[:, first] * lengths[:, second], 1e-12)
    communication = proportions[:, first] * proportions[:, second] * cosine
    return {
        "proportions": proportions.astype(np.float32),
        "types": counts > 0,
        "states": states.astype(np.float32),
        "communication": communication.astype(np.float32),
        "pairs": present[:, first] & present[:, second],
    }
