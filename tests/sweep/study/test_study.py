"""Files that trials of a study have read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from optuna.trial import TrialState

from stagesweep.sweep.study import manifest
from stagesweep.sweep.study.study import Study


def test_a_missing_file_that_existed_before_is_known(tmp_path: Path) -> None:
    states = [TrialState.COMPLETE, TrialState.FAIL]
    trials = [SimpleNamespace(number=n, state=state) for n, state in enumerate(states)]
    study: Any = SimpleNamespace(folder=tmp_path, trials=lambda: trials)
    for number, name in enumerate(["found.csv", "never.csv"]):
        (tmp_path / str(number)).mkdir()
        text = f"data:\n  path: {tmp_path / 'away' / name}\n"
        (tmp_path / str(number) / "config.yaml").write_text(text)
    manifest.write(tmp_path, {"study": "s", "files": {str(tmp_path / "shared.csv"): "hash"}})
    assert Study.has_found(study, str(tmp_path / "shared.csv"))
    assert Study.has_found(study, str(tmp_path / "away" / "found.csv"))
    assert not Study.has_found(study, str(tmp_path / "away" / "never.csv"))
    assert not Study.has_found(study, str(tmp_path / "found.csv"))
