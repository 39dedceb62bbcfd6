"""Nodes are checked against the classes that they name; see also test_validation.py."""

from collections.abc import Callable

import pytest
from omegaconf import DictConfig

from stagesweep.base.errors import UserError
from stagesweep.config.validation import validate

Compose = Callable[..., DictConfig]


def test_a_stage_must_name_an_existing_part_of_the_model(compose: Compose) -> None:
    with pytest.raises(UserError, match=r"stage.score.part=cell: no such part of the model.*cells"):
        validate(compose("experiment=singlecell", "stage.score.part=cell"))
    with pytest.raises(UserError, match=r"stage.score.part: the model has parts.*patients"):
        validate(compose("experiment=singlecell", "stage.score.part=null"))
    with pytest.raises(UserError, match=r"stage.joint.part=cells: .* leave it null"):
        validate(compose("experiment=digits", "stage.joint.part=cells"))
