"""A simulated cohort of mice with known phenotypes, to score a clustering.

Nothing here is measured. The columns are those of a real file and effect sizes are of the same
order, so the same column map and experiment apply to both. The names of genes, centres and
equipment say that they are simulated.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.systems.audiogram.data import HIGHEST, LOWEST, Audiogram, Columns

THRESHOLDS = ["abr_6khz", "abr_12khz", "abr_18khz", "abr_24khz", "abr_30khz", "abr_click"]
# Mean threshold of a healthy young adult, dB SPL.
HEALTHY = np.array([41.0, 28.0, 27.0, 35.0, 50.0, 26.0])
# Hearing loss at severity 1 in dB, by frequency; each shape occurs in real knock-outs.
LOSSES = {
    "normal": [0, 0, 0, 0, 0, 0],
    "flat": [24, 26, 26, 25, 24, 26],
    "profound": [48, 60, 62, 56, 44, 60],
    "low frequency": [32, 26, 12, 3, 0, 12],
    "high frequency": [0, 2, 10, 28, 38, 6],
    "mid frequency": [3, 22, 34, 20, 4, 22],
    "notch": [0, 2, 30, 3, 0, 4],
    "extremes": [28, 6, 0, 6, 30, 4],
}
# Hearing loss with age in dB per day, by frequency; high frequencies are lost first.
AGEING = np.array([0.05, 0.05, 0.1, 0.2, 0.3, 0.1])
CENTRES = [f"simulated centre {letter}" for letter in "ABCDEFGH"]
Codes = NDArray[np.int64]
Flags = NDArray[np.bool_]


def simulate(
    animals: int,
    genes: int,
    controls: float,
    affected: float,
    penetrance: float,
    noise: float,
    missing_click: float,
    seed: int,
) -> pd.DataFrame:
    """Simulate a cohort, one row per animal: the columns of a real file, and `phenotype`.

    A gene has one phenotype (a fraction `affected` of the genes; the others have none), one
    severity and one centre. Litters have about four animals; a fraction `controls` of the animals
    are healthy littermates. A mutant has the phenotype of its gene with probability `penetrance`
    and its own severity. `phenotype` is that of the animal, not of its gene.

    Thresholds in dB SPL are the sum of the healthy mean, an offset of the centre, loss with age,
    random effects of litter and animal, the phenotype and noise (standard deviation `noise` for
    each frequency), rounded to 5 dB and clipped to 0 to 100. The click is missing in a fraction
    `missing_click` of the animals.
    """
    if animals < 1 or genes < 1:
        raise UserError(f"data.animals={animals} and data.genes={genes} must be at least 1")
    random = np.random.default_rng(seed)
    litters = max(1, animals // 4)
    litter = random.integers(litters, size=animals)
    gene = random.integers(genes, size=litters)[litter]
    centre = random.choice(len(CENTRES), genes, p=random.dirichlet(np.full(len(CENTRES), 3.0)))[
        gene
    ]
    mutant = random.random(animals) >= controls
    cohort = _describe(litter, gene, centre, mutant, random)

    phenotype = random.integers(1, len(LOSSES), genes) * (random.random(genes) < affected)
    shown = np.where(mutant & (random.random(animals) < penetrance), phenotype[gene], 0)
    severity = random.uniform(0.6, 1.2, genes)[gene] * random.lognormal(0, 0.2, animals)
    age = cohort["age_in_days"].to_numpy() - 100
    decibels = (
        HEALTHY
        + random.normal(0, 5, (len(CENTRES), len(HEALTHY)))[centre]
        + age[:, None] * AGEING
        + random.normal(0, 2, (litters, 1))[litter]
        + random.normal(0, 4, (animals, 1))
        + severity[:, None] * np.array(list(LOSSES.values()))[shown]
        + random.normal(0, noise, (animals, len(HEALTHY)))
    )
    decibels = (5 * np.round(decibels / 5)).clip(LOWEST, HIGHEST)
    decibels[:, :-1][random.random((animals, len(HEALTHY) - 1)) < 0.01] = np.nan
    decibels[random.random(animals) < missing_click, -1] = np.nan
    cohort[THRESHOLDS] = decibels
    return cohort.assign(phenotype=np.array(list(LOSSES))[shown])


def simulated_audiogram(
    columns: Columns,
    animals: int = 4000,
    genes: int = 400,
    controls: float = 0.2,
    affected: float = 0.7,
    penetrance: float = 0.85,
    noise: float = 6.0,
    missing_click: float = 0.37,
    seed: int = 0,
    standardise: Literal["equipment", "global"] = "equipment",
    min_group: int = 20,
    pca: int = 2,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    split_by: Sequence[str] = ("gene", "litter"),
    split_seed: int = 0,
) -> Audiogram:
    """Simulate a cohort and prepare it like one that is read from a file."""
    table = simulate(animals, genes, controls, affected, penetrance, noise, missing_click, seed)
    return Audiogram(table, columns, standardise, min_group, pca, fractions, split_by, split_seed)


def _describe(
    litter: Codes, gene: Codes, centre: Codes, mutant: Flags, random: np.random.Generator
) -> pd.DataFrame:
    """Return all columns of a real file except the thresholds."""
    animals = len(litter)
    names = np.array([f"Simulated{number:04d}" for number in range(gene.max() + 1)])[gene]
    male = random.random(animals) < 0.5
    homozygous = (random.random(gene.max() + 1) < 0.75)[gene]
    days = random.integers(91, 119, animals)
    site = np.array(CENTRES)[centre]
    return pd.DataFrame(
        {
            "specimen_id": [f"simulated-{number:06d}" for number in range(animals)],
            "gene_symbol": pd.Series(names).where(mutant),
            "allele_symbol": pd.Series(names + "<sim1>").where(mutant),
            "zygosity": np.where(
                mutant, np.where(homozygous, "homozygote", "heterozygote"), "wildtype"
            ),
            "sex": np.where(male, "male", "female"),
            "age_in_weeks": days // 7,
            "age_in_days": days,
            "weight": (22 + 7 * male + 0.05 * (days - 100) + random.normal(0, 2, animals)).round(2),
            "genetic_background": [f"simulated background {number % 3 + 1}" for number in centre],
            "phenotyping_center": site,
            "pipeline_name": [f"{name} pipeline" for name in site],
            "biological_sample_group": np.where(mutant, "experimental", "control"),
            "equipment_manufacturer": [f"simulated maker {number % 2 + 1}" for number in centre],
            "equipment_model": [f"simulated model {number % 5 + 1}" for number in centre],
            "litter_id": [f"simulated litter {number}" for number in litter],
            "strain_name": [f"simulated strain {number % 3 + 1}" for number in centre],
            "life_stage_name": "Early adult",
        }
    )
