"""The whole of `experiment=singlecell` on a small simulated cohort, with the real command."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = (
    "experiment=singlecell_cells",
    "data.donors=16",
    "data.cells=60",
    "data.genes=120",
    "data.types=4",
    "data.contrast=3.0",
    "stage.gmvae.epochs=10",
    "stage.gmvae.batch_size=32",
    "stage.gmvae.optimizer.lr=0.005",
    "model.cells.thinning=0.2",
    "model.cells.hidden=[64,32]",
    "model.cells.latent=8",
)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_a_run_and_the_stages_that_a_change_at_its_end_reuses(
    stagesweep: Command, tmp_path: Path
) -> None:
    stagesweep(*SMALL, "hydra.run.dir=first")
    first = result(tmp_path / "first")
    metrics = first["metrics"]
    assert metrics["score/test_accuracy"] > 0.8
    assert metrics["score/test_ari"] > 0.3
    assert 0 < metrics["score/test_pca_ari"] < 1
    folder = tmp_path / "first" / "stages"
    table = pd.read_csv(folder / "4_score" / "artifacts" / "comparison.csv")
    assert set(table["method"]) == {"model", "logistic", "pca"}
    cells = pd.read_csv(folder / "1_preprocess" / "artifacts" / "cells.csv")
    donors = cells.groupby("split")["donor"].unique()
    assert sum(map(len, donors)) == cells["donor"].nunique() == 16
    told = pd.read_csv(folder / "4_score" / "artifacts" / "predictions.csv")
    test = told[told["split"] == "test"]
    share = (test["label"] == test["predicted"]).mean()
    assert share == pytest.approx(metrics["score/test_accuracy"])

    stagesweep(*SMALL, "~stage.score.metrics.clusters", "hydra.run.dir=second")
    status = {stage["name"]: stage["status"] for stage in result(tmp_path / "second")["stages"]}
    assert status == {
        "preprocess": "reused", "baselines": "reused", "gmvae": "reused", "score": "ran"
    }  # fmt: skip


def test_patients_and_the_stages_that_another_classifier_reuses(
    stagesweep: Command, tmp_path: Path
) -> None:
    small = [
        *(each for each in SMALL if not each.startswith("experiment")),
        "experiment=singlecell",
        "stage.gmvae.epochs=3",
        "stage.pseudobulk.n_samples=4",
        "stage.pseudobulk.n_cells=100",
        "stage.patients.epochs=3",
        "stage.cross_validation.folds=2",
        "model.patients.hidden=[32,16]",
        "model.patients.width=8",
        "stage.figures.umap=false",
    ]
    stagesweep(*small, "hydra.run.dir=first")
    folder = tmp_path / "first" / "stages"
    drawn = {file.stem for file in (folder / "9_figures" / "figures").glob("*.png")}
    assert drawn == {"cells", "confusion", "proportions", "calibration", "roc"}
    table = pd.read_csv(folder / "8_cross_validation" / "artifacts" / "cross_validation.csv")
    scores = table.groupby("method")["score"].unique().map(set)
    assert {"voted_auroc", "auroc", "macro_f1", "ece", "ccc", "mae"} <= scores["model"]
    assert {"ccc", "mae"} == scores["ridge"] - {"ccc_type"}
    metrics = result(tmp_path / "first")["metrics"]
    assert metrics["cross_validation/ridge_ccc"] > 0.4

    stagesweep(*small, "hydra.run.dir=again")
    status = [stage["status"] for stage in result(tmp_path / "again")["stages"]]
    assert status == ["reused"] * 9

    changes = ("stage.patients.optimizer.lr=0.002", "model.patients.attention=false")
    stagesweep(*small, *changes, "hydra.run.dir=other")
    stages = {stage["name"]: stage["status"] for stage in result(tmp_path / "other")["stages"]}
    reused = [name for name, status in stages.items() if status == "reused"]
    assert reused == ["preprocess", "baselines", "gmvae", "score", "pseudobulk"]


def test_two_donors_of_a_file_are_held_out_in_turn(
    stagesweep: Command, real_data: Path, tmp_path: Path
) -> None:
    """Cells of two donors, each before and after a stimulus (Kang et al. 2018)."""
    others = ("baselines", "score", "patient_score", "figures")
    stagesweep(
        "experiment=singlecell",
        "data=singlecell",
        f"data.path={real_data / 'singlecell' / 'kang_muscat_1556.h5ad'}",
        "data.columns.label=cluster_id",
        "data.columns.donor=donor_id",
        "data.columns.condition=group_id",
        "data.paired=true",
        "data.variable=150",
        "stage.gmvae.epochs=1",
        "stage.pseudobulk.n_samples=6",
        "stage.patients.epochs=2",
        "stage.cross_validation.folds=2",
        "model.cells.hidden=[32]",
        "model.patients.hidden=[16]",
        *(f"~stage.{name}" for name in others),
        "hydra.run.dir=run",
    )
    folder = tmp_path / "run" / "stages" / "5_cross_validation" / "artifacts"
    with np.load(folder / "out_of_fold.npz") as out:
        folds = pd.Series(out["fold"]).groupby(out["model/donor"]).unique().map(list)
        assert sorted(folds) == [[1], [2]]
        patients = pd.Series(out["model/patient"]).groupby(out["model/donor"]).nunique()
        assert patients.tolist() == [2, 2], "of each donor one before, one after"
        assert len(out["fold"]) == 3 * 4 * 6
    metrics = result(tmp_path / "run")["metrics"]
    assert metrics["cross_validation/ridge_ccc"] > 0.5
    assert metrics["cross_validation/ridge_ccc"] != metrics["cross_validation/ccc"]
