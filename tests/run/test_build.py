"""Stages are built from their config, and models start from weights of other runs."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import execution_whitelist
from omegaconf import OmegaConf
from torch import nn

from stagesweep.base.errors import UserError
from stagesweep.config import schema, trust
from stagesweep.core import checkpoint
from stagesweep.run.build import build, build_stage, init_from, part_weights
from stagesweep.stage.fit import Fit


def test_a_stage_is_built_from_its_schema_with_open_fields_instantiated() -> None:
    node = OmegaConf.structured(schema.Fit(epochs=2, sampler={"_target_": "torch.nn.Identity"}))
    with execution_whitelist(trust.trusted()):
        stage = build_stage("fit", node)
    assert isinstance(stage, Fit)
    assert isinstance(stage.optimizer, schema.Optimizer)
    assert isinstance(stage.sampler, nn.Identity)


def test_init_from_loads_matching_tensors_and_logs_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("test")
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "weights.pt"
    state = {"weight": source.weight.detach(), "bias": torch.zeros(5)}
    checkpoint.save(path, {"model": state})
    with caplog.at_level(logging.INFO):
        init_from(target, path, log)
    assert torch.equal(target.weight, source.weight)
    assert "1 of 2 tensors" in caplog.text
    assert "left as initialised: bias" in caplog.text
    checkpoint.save(path, {"model": {"other": torch.zeros(1)}})
    with pytest.raises(UserError, match="fits no parameter of this model"):
        init_from(target, path, log)


def test_weights_of_a_part_are_loaded_into_it(tmp_path: Path, caplog: Any) -> None:
    cells, patients = nn.Linear(2, 3), nn.Linear(2, 3)
    state = {f"cells.{name}": value for name, value in cells.state_dict().items()}
    checkpoint.save(tmp_path / "weights.pt", {"model": state})
    assert list(part_weights(state, "cells")) == ["weight", "bias"]
    other = nn.Linear(2, 3)
    init_from(other, tmp_path / "weights.pt", logging.getLogger(), "cells")
    assert torch.equal(other.weight, cells.weight)
    before = patients.weight.clone()
    init_from(patients, tmp_path / "weights.pt", logging.getLogger(), "patients")
    assert torch.equal(patients.weight, before)
    assert "no weights of model.patients" in caplog.text


LAB = """
class Nothing: ...

def nothing(**arguments): ...
"""


@pytest.mark.parametrize(
    ("path", "target", "line"),
    [
        ("data", "nothing", "returns None, not data with spec and split"),
        ("data", "Nothing", "returns a Nothing, not data with spec and split"),
        ("model.encoder", "nothing", "returns None, not a torch module"),
        ("loss.kl", "Nothing", "returns a Nothing, not a torch module"),
        ("stage.mine", "nothing", "returns None, not a stage that can be called"),
    ],
)
def test_a_target_of_the_wrong_kind_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, target: str, line: str
) -> None:
    (tmp_path / "lab_of_mine.py").write_text(LAB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "added", ("lab_of_mine.*",))
    node = OmegaConf.create({"_target_": f"lab_of_mine.{target}"})
    with execution_whitelist(trust.trusted()), pytest.raises(UserError) as caught:
        build(path, node)
    assert str(caught.value) == f"{path}._target_: 'lab_of_mine.{target}' {line}"


def test_fields_of_a_stage_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab_of_mine.py").write_text(LAB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "added", ("lab_of_mine.*",))
    nothing = {"_target_": "lab_of_mine.nothing"}
    for values, key in (
        ({"sampler": nothing}, "sampler"),
        ({"metrics": {"m": nothing}}, "metrics.m"),
    ):
        node = OmegaConf.structured(schema.Fit(epochs=2, **values))
        with (
            execution_whitelist(trust.trusted()),
            pytest.raises(UserError, match=rf"^stage.fit.{key}._target_: .* returns None, not a "),
        ):
            build_stage("fit", node)
