"""Cross-validation of an experiment that was not made for it, with the real command."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def test_digits_in_two_folds(stagesweep: Command, tmp_path: Path) -> None:
    others = ("pretrain", "init_clusters", "joint", "evaluate")
    stagesweep("experiment=tiny_folds", *(f"~stage.{n}" for n in others), "hydra.run.dir=run")
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["folds/ari_low"] <= metrics["folds/ari"] <= metrics["folds/ari_high"]
    assert metrics["folds/logistic_accuracy"] > 0.9
    folder = tmp_path / "run" / "stages" / "1_folds"
    with np.load(folder / "artifacts" / "out_of_fold.npz") as out:
        digits = load_digits().target
        assert (out["model/digit"] == digits).all(), "each image is told once, in order"
        right = out["logistic/assignment"].argmax(1) == digits
        each = [right[out["fold"] == fold].mean() for fold in (1, 2)]
    assert metrics["folds/logistic_accuracy"] == pytest.approx(np.mean(each))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"fold_1", "fold_2"}
