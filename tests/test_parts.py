"""A model of several parts: what a stage reads of it, and what it leaves."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from stagesweep.base.errors import UserError
from stagesweep.config.validation import validate
from stagesweep.core import checkpoint
from stagesweep.run.build import init_from, of_part
from stagesweep.store.stage_inputs import fingerprints

Compose = Callable[..., DictConfig]


def test_a_stage_counts_the_part_it_uses(compose: Compose) -> None:
    """What changes, and the first stage that is not the same any more."""
    before = fingerprints(compose("experiment=singlecell"))
    firsts = {
        "model.patients.width=64": "patients",
        "stage.patients.optimizer.lr=0.01": "patients",
        "stage.cross_validation.folds=3": "cross_validation",
        "model.cells.latent=9": "gmvae",
    }
    for override, first in firsts.items():
        after = fingerprints(compose("experiment=singlecell", override))
        changed = [name for name in after if before[name] != after[name]]
        assert changed == list(before)[list(before).index(first) :], override


def test_a_stage_names_its_part_and_a_model_has_it(compose: Compose) -> None:
    with pytest.raises(UserError, match=r"stage.score.part=cell: no such part of the model.*cells"):
        validate(compose("experiment=singlecell", "stage.score.part=cell"))
    with pytest.raises(UserError, match=r"stage.score.part: the model has parts.*patients"):
        validate(compose("experiment=singlecell", "stage.score.part=null"))
    with pytest.raises(UserError, match=r"stage.joint.part=cells: .* leave it null"):
        validate(compose("experiment=digits", "stage.joint.part=cells"))


def test_weights_of_a_part_go_back_into_it(tmp_path: Path, caplog: Any) -> None:
    cells, patients = nn.Linear(2, 3), nn.Linear(2, 3)
    state = {f"cells.{name}": value for name, value in cells.state_dict().items()}
    checkpoint.save(tmp_path / "weights.pt", {"model": state})
    assert list(of_part(state, "cells")) == ["weight", "bias"]
    other = nn.Linear(2, 3)
    init_from(other, tmp_path / "weights.pt", logging.getLogger(), "cells")
    assert torch.equal(other.weight, cells.weight)
    before = patients.weight.clone()
    init_from(patients, tmp_path / "weights.pt", logging.getLogger(), "patients")
    assert torch.equal(patients.weight, before)
    assert "nothing of model.patients" in caplog.text
