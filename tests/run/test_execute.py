"""The folder of a run is a new one, or that of an earlier run."""

from pathlib import Path

import pytest

from stagesweep.base.errors import UserError
from stagesweep.run.execute import refuse_foreign


def as_hydra_leaves(folder: Path) -> None:
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("seed: 0")
    (folder / "run.log").touch()


def test_a_folder_with_files_of_its_own_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    for name in ("config.yaml", "thesis.tex"):
        (tmp_path / name).write_text("title: mine\nstage: left\n")
    as_hydra_leaves(tmp_path)
    with pytest.raises(UserError) as caught:
        refuse_foreign(tmp_path, ".hydra")
    assert str(caught.value) == (
        f"{tmp_path} has files of its own (config.yaml and 1 more); name a new folder, or that of "
        "an earlier run, with hydra.run.dir=<folder>"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "thesis.tex"]


def test_a_new_folder_and_that_of_a_run_are_taken(tmp_path: Path) -> None:
    as_hydra_leaves(tmp_path)
    refuse_foreign(tmp_path, ".hydra")
    (tmp_path / "config.yaml").write_text("experiment: x\nstage:\n  fit: {}\nobjective: {}\n")
    (tmp_path / "notes.txt").touch()
    refuse_foreign(tmp_path, ".hydra")
    assert (tmp_path / ".hydra" / "config.yaml").exists()
