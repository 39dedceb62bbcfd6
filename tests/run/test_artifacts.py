"""Artifacts are read as they were written."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stagesweep.base.errors import UserError
from stagesweep.run import artifacts


def test_each_format_is_read_as_it_was_written(tmp_path: Path) -> None:
    arrays = {"x": np.arange(3), "names": np.array(["a", "b"])}
    artifacts.write(tmp_path / "a.npz", arrays)
    found = artifacts.read(tmp_path / "a.npz")
    assert {name: value.tolist() for name, value in found.items()} == {
        "x": [0, 1, 2],
        "names": ["a", "b"],
    }
    artifacts.write(tmp_path / "a.json", {"k": [3, None]})
    assert artifacts.read(tmp_path / "a.json") == {"k": [3, None]}
    table = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    artifacts.write(tmp_path / "a.csv", table)
    pd.testing.assert_frame_equal(artifacts.read(tmp_path / "a.csv"), table)


@pytest.mark.parametrize("name", ["a.npz", "a.json", "a.csv"])
def test_a_damaged_artifact_is_named_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'"\xff\n1,2')
    with pytest.raises(UserError, match=f"{name}, which an earlier stage left, is damaged: .*; set "
                       "resume=never, or .*verify --repair") as error:  # fmt: skip
        artifacts.read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no artifact format for '\.pkl'"):
        artifacts.write(tmp_path / "a.pkl", {})
    assert not list(tmp_path.iterdir())
