"""A run on a machine with too little memory."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., "subprocess.CompletedProcess[str]"]

SMALL = """
import torch
from stagesweep.systems.audiogram.model.vae import ClusteringVAE


class Small(ClusteringVAE):
    def forward(self, batch):
        if len(batch["image"]) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(batch)
"""


def test_out_of_memory_halves_the_batch_and_is_recorded(
    stagesweep: Command, tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(SMALL)

    def run(*more: str) -> dict[str, Any]:
        stagesweep(
            "experiment=tiny",
            "model._target_=small.Small",
            "hydra.run.dir=run",
            *more,
            PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2] / 'src'}",
            STAGESWEEP_TRUST="small",
        )
        result = json.loads((tmp_path / "run" / "result.json").read_text())
        found: dict[str, Any] = {stage["name"]: stage for stage in result["stages"]}
        return found

    stages = run("~stage.init_clusters", "~stage.joint", "hardware.profile=true")
    training = [e for e in stages["pretrain"]["oom"] if e["during"] == "training"]
    assert training == [
        {"during": "training", "from": 512, "to": 256, "step": 1},
        {"during": "training", "from": 256, "to": 128, "step": 1},
        {"during": "training", "from": 128, "to": 64, "step": 1},
    ]
    assert {e["during"] for e in stages["evaluate"]["oom"]} == {"prediction"}
    assert stages["pretrain"]["speed"]["samples_per_second"] > 0
    assert stages["evaluate"]["speed"] == {}
    assert "64 samples at a time instead of 128" in (tmp_path / "run" / "run.log").read_text()

    traced = (tmp_path / "run" / "stages" / "1_pretrain" / "profile").iterdir()
    assert {file.name for file in traced} == {f"pretrain.{end}" for end in ("json.gz", "md", "png")}

    stages |= {"before": stages["pretrain"]} | run("hardware.micro_batch=auto")
    assert stages["pretrain"]["status"] == "reused"
    assert stages["pretrain"]["oom"] == stages["before"]["oom"], "it says how it went"
    assert [e for e in stages["joint"]["oom"] if e["during"] == "training"] == []
    (file,) = (tmp_path / "store" / "micro_batches").iterdir()
    assert json.loads(file.read_text())["micro_batch"] in range(94, 101)
