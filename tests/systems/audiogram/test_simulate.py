"""The simulated cohort: same columns as a real file, known phenotypes, not solved by k-means."""

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.cluster import KMeans

from stagesweep.base.errors import UserError
from stagesweep.metric.clustering import ari
from stagesweep.systems.audiogram.data import Columns
from stagesweep.systems.audiogram.simulate import LOSSES, THRESHOLDS, simulate, simulated_audiogram

CONF = Path(__file__).parents[3] / "conf" / "data"
SETTINGS = {
    "animals": 4000,
    "genes": 400,
    "controls": 0.2,
    "affected": 0.7,
    "penetrance": 0.85,
    "noise": 6.0,
    "missing_click": 0.37,
    "seed": 0,
}


@pytest.fixture(scope="module")
def cohort():
    return simulate(**SETTINGS)


def configured(name):
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del node["_target_"], node["columns"]["_target_"]
    return node


def test_the_seed_determines_the_cohort(cohort):
    assert cohort.equals(simulate(**SETTINGS))
    assert not cohort[THRESHOLDS].equals(simulate(**SETTINGS | {"seed": 1})[THRESHOLDS])


def test_the_column_map_of_the_real_file_applies(cohort):
    node = configured("audiogram")
    real = Columns(**node["columns"])
    assert set(real.used()) <= set(cohort.columns)
    simulated = configured("audiogram_simulated")["columns"]
    assert simulated["labels"].pop("phenotype") == "phenotype"
    assert simulated == node["columns"]


def test_it_has_every_column_of_the_real_file(cohort, real_data):
    with (real_data / "audiogram" / "impc_abr_labelled_1345.csv").open() as stream:
        header = next(csv.reader(stream))
    assert list(cohort.columns) == [*header, "phenotype"]


def test_thresholds_lie_on_the_lattice_and_click_is_often_missing(cohort):
    decibels = cohort[THRESHOLDS].to_numpy()
    known = decibels[~np.isnan(decibels)]
    assert (known % 5 == 0).all()
    assert known.min() >= 0
    assert known.max() <= 100
    assert np.isnan(decibels[:, -1]).mean() == pytest.approx(0.37, abs=0.04)
    assert np.isnan(decibels[:, :-1]).mean() < 0.02


def test_controls_are_healthy_littermates(cohort):
    control = cohort["biological_sample_group"] == "control"
    assert control.mean() == pytest.approx(0.2, abs=0.03)
    assert cohort.loc[control, "gene_symbol"].isna().all()
    assert (cohort.loc[control, "phenotype"] == "normal").all()
    assert set(cohort.loc[control, "litter_id"]) & set(cohort.loc[~control, "litter_id"])


def test_phenotypes_follow_genes_with_the_given_penetrance(cohort):
    mutants = cohort[cohort["gene_symbol"].notna()]
    shown = mutants.groupby("gene_symbol")["phenotype"].agg(lambda p: set(p) - {"normal"})
    assert (shown.map(len) <= 1).all()
    affected = mutants[mutants["gene_symbol"].map(shown.map(len)) == 1]
    assert (affected["phenotype"] != "normal").mean() == pytest.approx(0.85, abs=0.03)
    means = cohort.groupby("phenotype")[THRESHOLDS].mean()
    loss = means - means.loc["normal"]
    for name, shape in LOSSES.items():
        if name != "normal":
            found, given = loss.loc[name].to_numpy(), np.array(shape, dtype=float)
            cosine = found @ given / np.linalg.norm(found) / np.linalg.norm(given)
            assert cosine > 0.95, name


def test_k_means_does_not_solve_it():
    node = configured("audiogram_simulated")
    data = simulated_audiogram(**node | {"columns": Columns(**node["columns"])})
    view = data.split("train")
    found = KMeans(len(LOSSES), n_init=3, random_state=0).fit_predict(view["thresholds"].numpy())
    assert 0.2 < ari(view["phenotype"].numpy(), found) < 0.7


def test_sizes_below_one_are_refused():
    with pytest.raises(UserError, match=r"data\.animals=0 and data\.genes=400 must be at least 1"):
        simulate(**SETTINGS | {"animals": 0})
