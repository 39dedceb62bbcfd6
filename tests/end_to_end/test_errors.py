"""Bad input gives one clear line, non-zero exit status and no traceback, with the real command."""

import gzip
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Warm

Command = Callable[..., "subprocess.CompletedProcess[str]"]

QUICK = ("stage.pretrain.epochs=1", "stage.joint.epochs=1", "stage.figures.umap=false")
# Training only, with a fixed number of clusters.
TRAINING = (
    "experiment=digits",
    *QUICK,
    "~stage.choose_clusters",
    "~stage.baselines",
    "~stage.evaluate",
    "~stage.figures",
    "objective.metric=joint/val_loss",
    "stage.init_clusters.k=10",
    "hydra.run.dir=run",
)


@pytest.fixture
def command(warm: "Warm") -> Command:
    """The real command, in a folder and with a store of its own."""

    def run(cwd: Path, *overrides: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return warm.run(overrides, cwd, {"STAGESWEEP_STORE": str(cwd / "store"), **environment})

    return run


def assert_one_line(finished: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """Assert status 1 and one line on stderr that contains all `parts`."""
    lines = [line for line in finished.stderr.splitlines() if line.startswith("stagesweep: ")]
    assert finished.returncode == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    assert len(lines) == 1, finished.stderr
    for part in parts:
        assert part in lines[0]


COMPOSITION = {
    "misspelled key": ("stage.joint.epoch=3", "stage.joint.epoch", "did you mean 'epochs'?"),
    "wrong type": ("stage.joint.epochs=many", "stage.joint.epochs", "'many'"),
    "unknown option": ("model=vae_bse", "no 'vae_bse' in group 'model'", "'vae_base'"),
    "unknown experiment": ("experiment=digit", "no 'digit' in group 'experiment'", "digits"),
    "unknown model argument": ("+model.latnt=3", "latnt", "did you mean 'latent'?"),
    "unknown term": ("+stage.joint.loss.klx={weight: 1}", "klx", "kl"),
    "missing metric": ("objective.metric=evaluate/nmmi", "evaluate/nmmi", "nmi"),
    "missing file": ("init_from=nowhere.pt", "nowhere.pt"),
}


@pytest.mark.parametrize("case", COMPOSITION)
def test_a_bad_config_is_refused_before_anything_is_written(
    command: Command, case: str, tmp_path: Path
) -> None:
    override, *parts = COMPOSITION[case]
    finished = command(tmp_path, "experiment=digits", override, "hydra.run.dir=run")
    assert_one_line(finished, *parts)
    assert not (tmp_path / "store").exists()


def test_a_traceback_is_shown_when_asked_for(command: Command, tmp_path: Path) -> None:
    finished = command(tmp_path, "init_from=nowhere.pt", HYDRA_FULL_ERROR="1")
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "nowhere.pt" in finished.stderr


def test_more_clusters_than_samples(command: Command, tmp_path: Path) -> None:
    assert_one_line(command(tmp_path, *TRAINING, "stage.init_clusters.k=5000"), "5000", "1797")


def test_a_bad_loss_names_term_epoch_and_step(command: Command, tmp_path: Path) -> None:
    overrides = ("stage.pretrain.optimizer.lr=1e30", "stage.pretrain.clip_norm=null")
    finished = command(tmp_path, *TRAINING, *overrides)
    assert_one_line(finished, "pretrain: loss term '", "became", "in epoch 1, step")
    assert "remedy" not in finished.stderr
    assert '"status": "failed"' in (tmp_path / "run" / "result.json").read_text()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04truncated"])
def test_a_foreign_checkpoint_is_named(command: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign.pt").write_bytes(content)
    finished = command(tmp_path, "experiment=digits", *QUICK, "init_from=foreign.pt")
    assert_one_line(finished, "foreign.pt", "truncated or foreign")


def simulated(folder: Path, real_data: Path) -> Path:
    """A small part of the real labelled table, for a test to damage."""
    lines = (real_data / "audiogram" / "impc_abr_labelled_1345.csv").read_text().splitlines()
    path = folder / "mice.csv"
    path.write_text("\n".join(lines[:300]) + "\n")
    return path


def test_a_missing_table_is_named(command: Command, tmp_path: Path) -> None:
    finished = command(tmp_path, "experiment=audiogram", "data.path=nowhere.csv")
    assert_one_line(finished, "nowhere.csv")


def test_a_missing_mandatory_path_is_named(command: Command, tmp_path: Path) -> None:
    assert_one_line(command(tmp_path, "experiment=audiogram"), "data.path")


def test_a_missing_column_is_named_with_the_nearest(
    command: Command, tmp_path: Path, real_data: Path
) -> None:
    path = simulated(tmp_path, real_data)
    path.write_text(path.read_text().replace("abr_12khz", "abr_12_khz"))
    finished = command(tmp_path, "experiment=audiogram", f"data.path={path}")
    assert_one_line(finished, "abr_12khz", str(path), "abr_12_khz")


def test_an_empty_table_is_named(command: Command, tmp_path: Path, real_data: Path) -> None:
    path = simulated(tmp_path, real_data)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    finished = command(tmp_path, "experiment=audiogram", f"data.path={path}")
    assert_one_line(finished, str(path))


def test_a_truncated_compressed_table_is_named(
    command: Command, tmp_path: Path, real_data: Path
) -> None:
    whole = gzip.compress(simulated(tmp_path, real_data).read_bytes())
    path = tmp_path / "mice.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    finished = command(tmp_path, "experiment=audiogram", f"data.path={path}")
    assert_one_line(finished, str(path))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 300 kB; skipped where mounting is not allowed."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_nothing_is_half_written(
    command: Command, tmp_path: Path, tiny_disk: Path
) -> None:
    finished = command(tmp_path, *TRAINING, STAGESWEEP_STORE=str(tiny_disk))
    assert_one_line(finished, "disk full", str(tiny_disk), "free space")
    assert not list(tiny_disk.rglob("*.tmp"))
    assert not list(tiny_disk.rglob("manifest.json"))
    again = command(tmp_path, *TRAINING)
    assert again.returncode == 0, again.stderr
