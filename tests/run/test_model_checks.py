"""Names of parameters are checked before the first stage trains."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import execution_whitelist

from stagesweep.base.errors import UserError
from stagesweep.config import trust
from stagesweep.core import checkpoint
from stagesweep.run.context import Context
from stagesweep.run.model_checks import check_stages


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    with execution_whitelist(trust.trusted()):
        yield


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stage.joint.freeze=[encodre]", "stage.joint.freeze: 'encodre' matches no parameter"),
        ("stage.joint.train=[x.*]", "stage.joint.train: 'x.*' matches no parameter"),
        ("stage.joint.freeze=['*']", "stage.joint: no parameter is left to train"),
        (
            "+stage.joint.optimizer.groups={haed: {lr: 1e-4}}",
            "stage.joint.optimizer.groups: 'haed' matches no parameter",
        ),
    ],
)
def test_a_later_stage_is_checked_at_the_start(compose: Any, override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        check_stages(Context(compose("experiment=digits", override)))
    assert str(caught.value).startswith(line)


def test_the_columns_of_a_later_stage_are_checked_at_the_start(compose: Any) -> None:
    with pytest.raises(UserError, match=r"^stage.evaluate.label=digti, but the data has no such"):
        check_stages(Context(compose("experiment=digits", "stage.evaluate.label=digti")))


def test_initial_weights_are_checked_at_the_start(compose: Any, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    config = compose("experiment=digits", f"init_from={file}")
    checkpoint.save(file, {"model": {"encoder.0.weight": torch.zeros(2)}})
    with pytest.raises(UserError, match=r"weights\.pt fits no parameter of this model"):
        check_stages(Context(config))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read checkpoint .*weights.pt: truncated"):
        check_stages(Context(config))


def test_the_name_of_a_module_selects_all_its_parameters(compose: Any) -> None:
    check_stages(Context(compose("experiment=digits", "stage.joint.freeze=[encoder]")))
