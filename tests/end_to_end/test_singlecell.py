"""The whole of `experiment=singlecell` on a small simulated cohort, with the real command."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = (
    "experiment=singlecell",
    "data.donors=16",
    "data.cells=60",
    "data.genes=120",
    "data.types=4",
    "data.contrast=2.0",
    "stage.gmvae.epochs=8",
    "stage.gmvae.batch_size=32",
    "stage.gmvae.optimizer.lr=0.005",
    "model.thinning=0.2",
    "model.hidden=[64,32]",
    "model.latent=8",
)


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_a_run_and_what_a_change_of_its_end_reuses(stagesweep: Command, tmp_path: Path) -> None:
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
