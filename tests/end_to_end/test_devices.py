"""Several processes, and smaller micro-batches, give the results of one process with whole batches:
the real command, started directly and by torchrun.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stagesweep.hardware.throughput import SPEED

if TYPE_CHECKING:
    from conftest import Warm

Run = Callable[..., None]

COMMON = (
    "hardware=cpu",
    "stage.joint.epochs=3",
    "objective.metric=joint/val_loss",
    "~stage.choose_clusters",
    "~stage.baselines",
    "~stage.evaluate",
    "~stage.figures",
)
DIGITS = ("experiment=digits", *COMMON, "stage.pretrain.epochs=1")
# Long enough to be killed before its end.
EARS = (
    "experiment=audiogram_simulated",
    "data.animals=400",
    "data.genes=40",
    *COMMON,
    "stage.pretrain.epochs=12",
    "stage.pretrain.save_seconds=0",
)
# A stage computes the data of the classifier. Dropout depends on the division.
CELLS = (
    "experiment=singlecell",
    "hardware=cpu",
    "data.donors=16",
    "data.cells=60",
    "data.genes=120",
    "data.types=4",
    "model.cells.hidden=[64,32]",
    "model.cells.thinning=0",
    "model.cells.dropout=0",
    "model.patients.hidden=[32,16]",
    "model.patients.dropout=0",
    "stage.gmvae.epochs=3",
    "~stage.gmvae.metrics.types",  # ranks of nearly equal numbers are not a smooth function of them
    "stage.pseudobulk.n_samples=4",
    "stage.patients.epochs=3",
    *(f"~stage.{name}" for name in ("baselines", "score", "patient_score", "cross_validation")),
    "~stage.figures",
    "objective.metric=patients/val_loss",
)
HERE = "another process of this run has ended"


def start(folder: Path, *command: str) -> "subprocess.Popen[str]":
    """A Python command in a process of its own."""
    environment = {"STAGESWEEP_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def run(warm: "Warm") -> Run:
    """The command to its end, in a folder: `run(folder, "seed=1", store="store")`."""

    def to_end(folder: Path, *overrides: str, store: str) -> None:
        process = warm.run(overrides, folder, {"STAGESWEEP_STORE": str(folder / store)})
        assert process.returncode == 0, process.stderr
        assert not process.stderr

    return to_end


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def statuses(folder: Path) -> list[str]:
    return [stage["status"] for stage in result(folder)["stages"]]


def assert_same_numbers(folder: Path, expected: Path) -> None:
    """All metrics of every epoch except speed; the last stage has three epochs."""
    curves = [
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (folder, expected)
    ]
    for row, wanted in zip(*curves, strict=True):
        assert row.keys() == wanted.keys()
        for name in row.keys() - {*SPEED, "stage", "kind"}:
            same = wanted[name] if isinstance(wanted[name], str | None) else None
            near = same or pytest.approx(wanted[name], rel=1e-5, abs=1e-6)
            assert row[name] == near, (name, wanted)
    last = curves[0][-1]["stage"]
    assert {row["epoch"] for row in curves[0] if row["stage"] == last} == {1, 2, 3}


@pytest.fixture(scope="module")
def digits(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of one process and of two, each with a store of its own."""
    folder = tmp_path_factory.mktemp("digits")
    run(folder, *DIGITS, "hydra.run.dir=one", store="of_one")
    run(folder, *DIGITS, "hydra.run.dir=two", "hardware.devices=2", store="of_two")
    return folder


def test_two_processes_have_the_curve_of_one(digits: Path) -> None:
    assert_same_numbers(digits / "two", digits / "one")
    assert statuses(digits / "two") == ["ran"] * 3


def test_only_the_main_process_writes(digits: Path) -> None:
    one, two = (
        sorted(path.relative_to(digits / name) for path in (digits / name).rglob("*.*"))
        for name in ("one", "two")
    )
    events = [[path for path in each if "tfevents" in path.name] for each in (one, two)]
    assert len(events[0]) == len(events[1]) == 1
    assert set(one) - set(events[0]) == set(two) - set(events[1])
    assert (digits / "two" / "run.log").read_text().count("hardware: cpu") == 1


def test_one_process_reuses_the_stages_of_two(run: Run, digits: Path) -> None:
    run(digits, *DIGITS, "hydra.run.dir=again", store="of_two")
    assert statuses(digits / "again") == ["reused"] * 3


def test_two_processes_train_on_derived_data(run: Run, tmp_path: Path) -> None:
    run(tmp_path, *CELLS, "hydra.run.dir=one", store="of_one")
    run(tmp_path, *CELLS, "hydra.run.dir=two", "hardware.devices=2", store="of_two")
    assert_same_numbers(tmp_path / "two", tmp_path / "one")
    assert statuses(tmp_path / "two") == ["ran"] * 4


def test_micro_batches_of_digits_have_the_curve_of_the_batch(run: Run, digits: Path) -> None:
    quarter = ("hydra.run.dir=quarter", "hardware.micro_batch=32")
    run(digits, *DIGITS, *quarter, store="of_quarter")
    assert_same_numbers(digits / "quarter", digits / "one")


@pytest.fixture(scope="module")
def ears(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process; its loss has pairs of animals with the same gene."""
    folder = tmp_path_factory.mktemp("ears")
    run(folder, *EARS, "hydra.run.dir=one", store="of_one")
    return folder


def test_pairs_across_micro_batches_count_as_in_the_batch(run: Run, ears: Path) -> None:
    eighth = ("hydra.run.dir=eighth", "hardware.micro_batch=32")
    run(ears, *EARS, *eighth, store="of_eighth")
    assert_same_numbers(ears / "eighth", ears / "one")


Node = "subprocess.Popen[str]"
StartNodes = Callable[[], list[Node]]


@pytest.fixture
def start_nodes(tmp_path: Path) -> Iterator[StartNodes]:
    """Start two nodes with one process each, as torchrun does, on this machine."""
    started: list[Node] = []

    def start_both() -> list[Node]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = ("torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=ears")
        end = f"--rdzv-endpoint=localhost:{port}"
        place = ("--rdzv-backend=c10d", end, "--local-addr=localhost")
        command = ("-m", *torchrun, *place, "-m", "stagesweep", *EARS, "hydra.run.dir=run")
        both = [start(tmp_path, *command) for _ in range(2)]
        started.extend(both)
        return both

    yield start_both
    for each in started:
        each.kill()
        each.communicate()


def worker(node: Node) -> int:
    """The process that torchrun has started."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    return int(children[-1])


def test_two_nodes_end_when_a_process_is_killed_and_resume(
    ears: Path, start_nodes: StartNodes, tmp_path: Path
) -> None:
    def trained() -> int:
        texts = [path.read_text() for path in tmp_path.glob("store/??/*/metrics.jsonl")]
        return sum(text.count('"kind": "epoch"') for text in texts)

    nodes = start_nodes()
    until = time.monotonic() + 200
    while trained() < 3 and time.monotonic() < until and nodes[0].poll() is None:
        time.sleep(0.01)
    os.kill(worker(nodes[1]), signal.SIGKILL)
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert all(node.returncode != 0 for node in nodes), errors
    assert f"stagesweep: {HERE}" in errors[0], errors
    before = len(list(tmp_path.glob("store/??/*/manifest.json")))
    assert before == 0, "the first stage was not to be finished"

    nodes = start_nodes()
    errors = [node.communicate(timeout=300)[1] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), errors
    assert statuses(tmp_path / "run") == ["resumed", "ran", "ran"]
    assert_same_numbers(tmp_path / "run", ears / "one")
