import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stagesweep.store import command as store_command
from stagesweep.store.command import main
from stagesweep.store.store import Entry, Store

DAY = 86400.0
KEYS = [digit * 32 for digit in "abcdef"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STAGESWEEP_STORE", str(tmp_path / "store"))
    return Store.default()


Command = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process; return its status and the lines it printed."""

    def command(*arguments: str) -> tuple[int, list[str]]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, (captured.out + captured.err).splitlines()

    return command


def add(store: Store, key: str, days: float = 0, size: int = 1000, finished: bool = True) -> Entry:
    """Add an entry of a little more than ``size`` bytes, last used ``days`` ago."""
    entry = store.entry(key)
    with entry.hold():
        entry.begin(fresh=True, about={"experiment": "digits", "stage": "joint"})
        (entry.path / "last.pt").write_bytes(bytes(size))
        if finished:
            entry.commit({"experiment": "digits", "stage": "pretrain"})
    for path in entry.path.iterdir():
        os.utime(path, (time.time() - days * DAY,) * 2)
    return entry


def left(store: Store) -> str:
    return "".join(entry.fingerprint[0] for entry in store.entries())


def by_subprocess(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stagesweep.store.command", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------------- as a command


def test_as_a_process(store: Store) -> None:
    add(store, KEYS[0])
    done = by_subprocess("ls")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pretrain" in done.stdout
    (store.entry(KEYS[0]).path / "last.pt").unlink()
    done = by_subprocess("verify")
    assert (done.returncode, done.stderr) == (1, "")
    done = by_subprocess("prune")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "stagesweep-store: nothing to prune by; give --older-than, --max-size or --partial\n"
    )


def test_help_names_every_command() -> None:
    done = by_subprocess("--help")
    assert done.returncode == 0
    assert {"ls", "prune", "verify"} <= set(done.stdout.split())


def test_a_closed_pipe_is_not_an_error(store: Store) -> None:
    add(store, KEYS[0])
    command = [sys.executable, "-m", "stagesweep.store.command", "ls"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 0


@pytest.mark.parametrize("arguments", [["ls"], ["verify"], ["prune", "--partial"]])
def test_a_store_that_is_missing_or_empty(
    store: Store, command: Command, arguments: list[str]
) -> None:
    assert command(*arguments) == (0, [f"no stages in {store.root}"])
    assert not store.root.exists()
    store.root.mkdir()
    assert command(*arguments) == (0, [f"no stages in {store.root}"])


def test_another_store(store: Store, command: Command, tmp_path: Path) -> None:
    add(Store(tmp_path / "other"), KEYS[0])
    status, lines = command("ls", "--store", str(tmp_path / "other"))
    assert status == 0
    assert lines[-1].endswith(f", in {tmp_path / 'other'}")


# ---------------------------------------------------------------------------- ls


def test_ls_shows_a_table_last_used_first(store: Store, command: Command) -> None:
    add(store, KEYS[0], days=3, size=2_000_000)
    add(store, KEYS[1], days=0.25, size=10, finished=False)
    add(store, KEYS[2], days=40)
    status, lines = command("ls")
    assert status == 0
    cells = [re.split(r"  +", line) for line in lines[:-1]]
    sizes = [row.pop(4) for row in cells]
    assert cells == [
        ["FINGERPRINT", "EXPERIMENT", "STAGE", "STATE", "AGE", "LAST USED"],
        ["b" * 12, "digits", "joint", "partial", cells[1][4], "6 h ago"],
        ["a" * 12, "digits", "pretrain", "finished", cells[2][4], "3 d ago"],
        ["c" * 12, "digits", "pretrain", "finished", cells[3][4], "40 d ago"],
    ]
    assert sizes[2] == "2 MB"
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1] == f"3 entries, 2 MB, in {store.root}"


def test_ls_json(store: Store, command: Command) -> None:
    entry = add(store, KEYS[0], days=2)
    _, lines = command("ls", "--json")
    (row,) = json.loads("\n".join(lines))
    assert row["fingerprint"] == KEYS[0]
    assert (row["experiment"], row["stage"], row["state"]) == ("digits", "pretrain", "finished")
    assert row["bytes"] == entry.size()
    assert row["path"] == str(entry.path)
    assert row["used"] < row["created"]


def test_ls_json_of_an_empty_store(store: Store, command: Command) -> None:
    assert command("ls", "--json") == (0, ["[]"])


def test_ls_shows_running_and_damaged_entries(store: Store, command: Command) -> None:
    running = add(store, KEYS[0], finished=False)
    (add(store, KEYS[1]).path / "manifest.json").write_text('{"fil')
    (store.root / "cc" / KEYS[2]).mkdir(parents=True)
    with running.hold():
        _, lines = command("ls")
    states = {line[0]: line.split()[2:4] for line in lines[1:-1]}
    assert states == {
        "a": ["joint", "running"],
        "b": ["joint", "partial"],
        "c": ["?", "partial"],
    }


# ---------------------------------------------------------------------------- prune


def test_prune_by_age(store: Store, command: Command) -> None:
    for key, days in zip(KEYS, (0, 29, 31, 90), strict=False):
        add(store, key, days)
    status, lines = command("prune", "--older-than", "30d")
    assert status == 0
    assert left(store) == "ab"
    assert [line.split()[:3] for line in lines[:2]] == [
        ["removed", "d" * 12, "digits/pretrain"],
        ["removed", "c" * 12, "digits/pretrain"],
    ]
    assert lines[0].endswith("unused for 90 d")
    assert re.fullmatch(r"freed 2\.\d+ kB \(2 entries\); 2\.\d+ kB left", lines[2])


def test_prune_by_size_takes_the_least_recently_used(store: Store, command: Command) -> None:
    for key, days in zip(KEYS, (3, 1, 4, 2), strict=False):
        add(store, key, days, size=10_000)
    command("prune", "--max-size", "25kB")
    assert left(store) == "bd"
    _, lines = command("prune", "--max-size", "25kB")
    assert left(store) == "bd"
    assert lines[-1].startswith("freed 0 B (0 entries); 2")


def test_prune_by_size_counts_entries_removed_by_other_rules(
    store: Store, command: Command
) -> None:
    add(store, KEYS[0], days=9, size=10_000)
    add(store, KEYS[1], days=1, size=10_000, finished=False)
    command("prune", "--partial", "--max-size", "15kB")
    assert left(store) == "a"


def test_prune_partial(store: Store, command: Command) -> None:
    add(store, KEYS[0])
    add(store, KEYS[1], finished=False)
    command("prune", "--partial")
    assert left(store) == "a"


def test_a_dry_run_removes_nothing(store: Store, command: Command) -> None:
    for key in KEYS:
        add(store, key, days=5)
    _, dry = command("prune", "--older-than", "1d", "--dry-run")
    assert left(store) == "abcdef"
    _, lines = command("prune", "--older-than", "1d")
    assert left(store) == ""
    assert lines == [line.replace("would remove", "removed") for line in dry[:-1]] + [
        dry[-1].replace("would free", "freed")
    ]


def test_prune_keeps_entries_in_use(store: Store, command: Command) -> None:
    held = add(store, KEYS[0], days=50, finished=False)
    add(store, KEYS[1], days=40, size=20_000)
    with held.hold():
        status, lines = command("prune", "--older-than", "1d", "--partial", "--max-size", "0B")
    assert status == 0
    assert left(store) == "a"
    assert lines[0].startswith(f"kept  {'a' * 12}  digits/joint  {'a' * 12} is in use by process ")


def test_prune_keeps_entries_used_since_they_were_listed(
    store: Store, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = add(store, KEYS[0], days=50)
    hold = Entry.hold

    def used_meanwhile(self: Entry) -> object:
        entry.touch()
        return hold(self)

    monkeypatch.setattr(Entry, "hold", used_meanwhile)
    _, lines = command("prune", "--older-than", "1d")
    assert left(store) == "a"
    assert lines[0] == f"kept  {'a' * 12}  digits/pretrain  used a moment ago"


def test_prune_finishes_an_interrupted_deletion(store: Store, command: Command) -> None:
    add(store, KEYS[0])
    trash = store.root / "trash" / f"{KEYS[1]}-{'0' * 16}"
    (trash / "checkpoints").mkdir(parents=True)
    command("prune", "--older-than", "1d")
    assert not trash.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [("30d", 30 * DAY), ("12 h", DAY / 2), ("90min", 5400), ("1.5w", 10.5 * DAY), ("0s", 0)],
)
def test_durations(text: str, value: float) -> None:
    options = store_command._parser().parse_args(["prune", "--older-than", text])
    assert options.older_than == value


@pytest.mark.parametrize(
    ("text", "value"), [("20GB", 2e10), ("1.5 GiB", 1.5 * 2**30), ("500kb", 5e5), ("7B", 7)]
)
def test_sizes(text: str, value: float) -> None:
    options = store_command._parser().parse_args(["prune", "--max-size", text])
    assert options.max_size == value


@pytest.mark.parametrize(
    ("option", "text", "example"),
    [("--older-than", "30", "30d"), ("--older-than", "d", "30d"), ("--max-size", "-1GB", "20GB"),
     ("--max-size", "2 parsec", "20GB")],
)  # fmt: skip
def test_a_wrong_quantity_is_named(
    option: str, text: str, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prune", f"{option}={text}"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: '{text}' is not like {example}," in error


# ---------------------------------------------------------------------------- verify


def test_verify_names_the_damaged(store: Store, command: Command) -> None:
    for key in KEYS[:3]:
        add(store, key)
    add(store, KEYS[3], finished=False)
    (store.entry(KEYS[1]).path / "last.pt").write_bytes(b"x" * 1000)
    status, lines = command("verify")
    assert status == 1
    assert lines[0] == (
        f"damaged  {'b' * 12}  digits/pretrain  last.pt has changed since it was written"
    )
    assert re.fullmatch(r"read 3 entries, .* kB; 1 damaged", lines[1])
    assert left(store) == "abcd"


def test_verify_repair_removes_them(store: Store, command: Command) -> None:
    for key in KEYS[:2]:
        add(store, key)
    (store.entry(KEYS[1]).path / "last.pt").unlink()
    status, lines = command("verify", "--repair")
    assert status == 0
    assert lines[0].startswith(f"removed  {'b' * 12}  digits/pretrain  last.pt cannot be read")
    assert left(store) == "a"
    status, lines = command("verify")
    assert status == 0
    assert lines[-1].endswith("; none damaged")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1.234e9, "1.23 GB"),
     (5e13, "50 TB")],
)  # fmt: skip
def test_formatted_sizes(size: float, text: str) -> None:
    assert store_command._format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (1e6, "12 d")]
)
def test_formatted_durations(seconds: float, text: str) -> None:
    assert store_command._format_duration(seconds) == text
