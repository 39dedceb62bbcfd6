"""The content of result.json."""

import json
import math
from pathlib import Path

from stagesweep.run import result


def test_nan_and_infinities_are_null() -> None:
    assert result.without_nan({"a": [math.nan, math.inf, 1.0], "b": "x"}) == {
        "a": [None, None, 1.0],
        "b": "x",
    }


def test_metrics_are_named_by_their_stage() -> None:
    stages = [
        result.StageResult("first", "ran", 1.0, "", {"loss": 2.0}),
        result.StageResult("second", "reused", 0.1, "", {"loss": 1.0}),
    ]
    assert result.all_metrics(stages) == {"first/loss": 2.0, "second/loss": 1.0}


def test_an_unfinished_result_is_marked_as_failed(tmp_path: Path) -> None:
    result.write(tmp_path, {"status": "running", "seed": 3})
    result.mark_failed(tmp_path, "killed")
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == {"status": "failed", "seed": 3, "reason": "killed"}
    result.mark_failed(tmp_path / "empty", "killed")
    assert (tmp_path / "empty" / "result.json").exists()
