"""The command: help, completion, errors, exit status."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from stagesweep.config import register
from stagesweep.config.options import summary

Command = Callable[..., "subprocess.CompletedProcess[str]"]

WATCHED = """
import sys
from stagesweep.cli import main
try:
    main()
finally:
    print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--cfg", "job"),
        ("--info", "defaults"),
        ("-sc", "install=bash"),
        ("-sc", "query=bash"),
        ("stage.joint.epoch=3",),
    ],
)
def test_help_and_completion_import_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    process = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=tmp_path,
        env=os.environ | {"COMP_LINE": "stagesweep model="},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.splitlines()[-1] == "False", process.stderr
    assert not list(tmp_path.iterdir())


def test_help_lists_every_experiment_and_group(cold: Command) -> None:
    said = cold("--help").stdout
    for file in register.folder().rglob("*.yaml"):
        group, name = file.parent.relative_to(register.folder()).as_posix(), file.stem
        if group == "experiment":
            assert re.search(rf"^  {name} +{re.escape(summary(file))}$", said, re.MULTILINE), name
        elif not group.startswith((".", "hydra")):
            assert re.search(rf"^  {group} .*\b{name}\b", said, re.MULTILINE), f"{group}/{name}"
    assert re.search(r"^  tiny +A whole run in seconds", said, re.MULTILINE)  # the user's own
    assert "base_" not in said
    assert "${" not in said
    for word in ("outputs/", "multirun/", "STAGESWEEP_STORE", "-sc install=bash"):
        assert word in said


def test_the_composed_config_is_shown(cold: Command) -> None:
    said = cold("--cfg", "job", "experiment=tiny", "seed=3", "-p", "stage.joint").stdout
    assert "epochs: 2" in said
    assert "seed: 3" in cold("--cfg", "job", "experiment=tiny", "seed=3").stdout


def test_completion_knows_options_and_keys(cold: Command) -> None:
    said = cold("-sc", "query=bash", COMP_LINE="stagesweep model=").stdout.split()
    models = {f"model={file.stem}" for file in (register.folder() / "model").glob("*.yaml")}
    assert models <= set(said)
    said = cold("-sc", "query=bash", COMP_LINE="stagesweep objective.").stdout.split()
    assert {"objective.metric=", "objective.mode="} <= set(said)


def assert_one_line(process: "subprocess.CompletedProcess[str]", start: str) -> None:
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith(f"stagesweep: {start}")


def test_an_error_of_composition_is_one_line_and_writes_nothing(
    cold: Command, tmp_path: Path
) -> None:
    process = cold("experiment=tiny", "stage.joint.epoch=3", status=1)
    assert_one_line(process, "unknown key 'stage.joint.epoch': did you mean 'epochs'?")
    assert not list(tmp_path.iterdir())


def test_an_error_of_validation_is_one_line_and_runs_no_stage(
    stagesweep: Command, tmp_path: Path
) -> None:
    process = stagesweep("experiment=tiny", "model.latent=wide", "hydra.run.dir=run", status=1)
    assert_one_line(process, "model.latent=wide: ClusteringVAE expects int")
    assert not (tmp_path / "store").exists()


def test_hydra_full_error_shows_the_traceback(cold: Command) -> None:
    process = cold("experiment=tiny", "stage.joint.epoch=3", status=1, HYDRA_FULL_ERROR="1")
    assert "Traceback" in process.stderr


def test_conflicting_flags_are_one_line(cold: Command) -> None:
    process = cold("--cfg", "job", "--info", "all", status=1)
    assert_one_line(process, "Only one of --run, --multirun, --cfg, --info")


def test_an_unwritable_folder_is_one_line(stagesweep: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, where a folder is wanted")
    process = stagesweep("experiment=tiny", "hydra.run.dir=taken/run", status=1)
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert "taken" in process.stderr


def test_a_run_names_its_folder_by_experiment_time_and_host(
    stagesweep: Command, tmp_path: Path
) -> None:
    others = ("~stage.init_clusters", "~stage.joint", "~stage.evaluate")
    process = stagesweep("experiment=tiny", *others, "objective.metric=pretrain/val_loss")
    assert not process.stderr
    (folder,) = (tmp_path / "outputs" / "tiny").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\S+", folder.name)
    assert {"config.yaml", ".hydra", "run.log", "result.json"} <= {p.name for p in folder.iterdir()}
    assert "pretrain/val_loss" in (folder / "run.log").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == ["outputs"]


def test_a_signal_before_the_first_stage_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = import_module("stagesweep.cli")
    with pytest.raises(SystemExit) as caught:
        cli.stop(signal.SIGTERM, None)
    assert (caught.value.code, capsys.readouterr().err) == (143, "stagesweep: stopped by SIGTERM\n")
    # Another process of the same run says nothing: the main one does.
    monkeypatch.setattr(cli.launch, "is_follower", lambda: True)
    with pytest.raises(SystemExit):
        cli.stop(signal.SIGTERM, None)
    assert capsys.readouterr().err == ""
