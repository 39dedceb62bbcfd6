"""Tests that need a GPU: trials that share one, and results close to those of the CPU."""

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Command = Callable[..., "subprocess.CompletedProcess[str]"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHORT = ("experiment=tiny", "~stage.init_clusters", "~stage.joint", "~stage.evaluate")


def test_three_slots_share_one_gpu(cold: Command, tmp_path: Path) -> None:
    said = cold(
        "-m", *SHORT, "objective.metric=pretrain/val_loss", "stage.pretrain.epochs=2",
        "seed=0,1,2,3,4,5", "sweep.slots=3", "hydra.sweep.dir=sweep", CUDA_VISIBLE_DEVICES="0",
    )  # fmt: skip
    with (tmp_path / "sweep" / "results_summary.csv").open() as file:
        states = [row["state"] for row in csv.DictReader(file)]
    assert states == ["complete"] * 6, said.stdout + said.stderr


def test_a_fit_is_that_of_the_cpu(cold: Command, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        cold(
            *SHORT, "objective.metric=pretrain/val_loss", "stage.pretrain.epochs=2",
            f"hardware.device={device}", "hardware.precision=fp32", "hardware.tf32=false",
            f"hydra.run.dir={device}", STAGESWEEP_STORE=str(tmp_path / f"store_{device}"),
        )  # fmt: skip
        found.append(json.loads((tmp_path / device / "result.json").read_text())["metrics"])
    assert found[1] == pytest.approx(found[0], rel=1e-3, nan_ok=True)
