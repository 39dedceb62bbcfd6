import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.store import store as store_module
from stagesweep.store.store import BusyError, Entry, Store

KEY = "ab" * 16


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    return Store(tmp_path / "store").entry(KEY)


def finish(entry: Entry, files: dict[str, str] | None = None) -> None:
    with entry.hold():
        entry.begin(fresh=False, about={"experiment": "digits", "stage": "pretrain"})
        for name, text in (files or {"checkpoints/last.pt": "weights", "a.json": "{}"}).items():
            (entry.path / name).parent.mkdir(parents=True, exist_ok=True)
            (entry.path / name).write_text(text)
        entry.commit({"experiment": "digits", "stage": "pretrain", "metrics": {"nmi": 0.5}})


def tree(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


# ---------------------------------------------------------------------------- what an entry holds


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STAGESWEEP_STORE", raising=False)
    assert Store.default().root == tmp_path / ".stagesweep" / "store"
    monkeypatch.setenv("STAGESWEEP_STORE", "elsewhere")
    assert Store.default().root == tmp_path / "elsewhere"
    monkeypatch.setenv("STAGESWEEP_STORE", "~/s")
    assert Store.default().root == Path.home() / "s"


def test_an_empty_store_is_not_an_error(entry: Entry, tmp_path: Path) -> None:
    assert entry.manifest is None
    assert entry.damage() is None
    assert entry.about == {}
    assert (entry.size(), entry.used()) == (0, 0.0)
    assert Store(tmp_path / "store").entries() == []
    Store(tmp_path / "store").empty_trash()
    assert not (tmp_path / "store").exists()


def test_a_partial_entry_describes_itself(entry: Entry) -> None:
    with entry.hold():
        entry.begin(fresh=False, about={"experiment": "digits", "stage": "joint"})
    assert entry.manifest is None
    assert entry.about["stage"] == "joint"
    assert entry.about["host"] == socket.gethostname()
    assert entry.used() == pytest.approx(time.time(), abs=60)


def test_a_finished_entry(entry: Entry) -> None:
    finish(entry)
    manifest = entry.manifest
    assert manifest is not None
    assert manifest == entry.about
    assert manifest["metrics"] == {"nmi": 0.5}
    assert manifest["fingerprint"] == KEY
    assert manifest["files"]["a.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert entry.damage(thorough=True) is None
    assert entry.size() > len("weights{}")


@settings(max_examples=30)
@given(keep=st.floats(0, 1, exclude_max=True))
def test_a_truncated_manifest_counts_as_unfinished(
    tmp_path_factory: pytest.TempPathFactory, keep: float
) -> None:
    entry = Store(tmp_path_factory.mktemp("store")).entry(KEY)
    finish(entry)
    path = entry.path / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert entry.manifest is None
    assert entry.about["stage"] == "pretrain"


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"files": 1}', '{"files": {"a": {}}}', "\xff"])
def test_a_foreign_manifest_counts_as_unfinished(entry: Entry, text: str) -> None:
    finish(entry)
    (entry.path / "manifest.json").write_text(text, encoding="latin1")
    assert entry.manifest is None


def test_damage_is_named(entry: Entry) -> None:
    finish(entry)
    path = entry.path / "checkpoints" / "last.pt"
    path.write_text("WEIGHTS")
    assert entry.damage() is None
    assert entry.damage(thorough=True) == ("checkpoints/last.pt has changed since it was written")
    path.write_text("w")
    assert entry.damage() == "checkpoints/last.pt has 1 bytes, not 7"
    path.unlink()
    assert entry.damage() == "checkpoints/last.pt cannot be read: No such file or directory"


def test_publish_links_the_files_of_the_stage(entry: Entry, tmp_path: Path) -> None:
    files = {"checkpoints/last.pt": "w", "artifacts/manifest.json": "mine", "m.jsonl": ""}
    finish(entry, files)
    (entry.path / ".0123.tmp").write_text("half")
    entry.publish(tmp_path / "run")
    assert tree(tmp_path / "run") == files
    assert (tmp_path / "run" / "m.jsonl").samefile(entry.path / "m.jsonl")
    entry.publish(tmp_path / "run")
    assert tree(tmp_path / "run") == files


def test_a_published_stage_outlives_its_entry(entry: Entry, tmp_path: Path) -> None:
    finish(entry, {"a": "1"})
    entry.publish(tmp_path / "run")
    with entry.hold():
        entry.discard()
    assert tree(tmp_path / "run") == {"a": "1"}


def test_begin_keeps_the_files_of_a_partial_entry(entry: Entry) -> None:
    finish(entry, {"checkpoints/last.pt": "w"})
    (entry.path / "checkpoints" / ".0123.tmp").write_text("half")
    with entry.hold():
        entry.begin(fresh=False)
    assert entry.manifest is None
    assert tree(entry.path).keys() == {"begun.json", "checkpoints/last.pt"}


def test_begin_fresh_removes_everything(entry: Entry, tmp_path: Path) -> None:
    finish(entry)
    with entry.hold():
        entry.begin(fresh=True)
    assert tree(entry.path).keys() == {"begun.json"}
    assert list((tmp_path / "store" / "trash").iterdir()) == []


def test_commit_replaces_an_earlier_manifest(entry: Entry) -> None:
    finish(entry, {"a": "1"})
    finish(entry, {"b": "22"})
    assert entry.manifest is not None
    assert entry.manifest["files"].keys() == {"a", "b"}


def test_touch_sets_the_last_use(entry: Entry) -> None:
    finish(entry)
    os.utime(entry.path / "manifest.json", (1e9, 1e9))
    assert entry.used() == 1e9
    entry.touch()
    assert entry.used() == pytest.approx(time.time(), abs=60)


def test_discard_leaves_no_trace(entry: Entry, tmp_path: Path) -> None:
    finish(entry)
    with entry.hold():
        entry.discard()
        entry.discard()
    assert tree(tmp_path) == {}


def test_only_entries_are_listed_and_only_trash_is_emptied(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in (KEY, "0" * 32):
        finish(store.entry(key))
    for name in ("my/photos", "my/" + "g" * 32, "trash/letters", f"trash/{KEY}-{'0' * 16}"):
        (tmp_path / name).mkdir(parents=True)
    assert [entry.fingerprint for entry in store.entries()] == ["0" * 32, KEY]
    store.empty_trash()
    assert [path.name for path in (tmp_path / "trash").iterdir()] == ["letters"]


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    entry = Store(tmp_path / "file").entry(KEY)
    with pytest.raises(UserError, match=r"^cannot use .*; check the disk, or set "), entry.hold():
        pass


# ---------------------------------------------------------------------------- one at a time

PREAMBLE = """
import os, signal, socket, sys, time
from pathlib import Path
from stagesweep.store import store
def say(text): print(text, flush=True)
"""
HOLD = "with entry.hold():\n    say('held')\n    time.sleep(60)"


@contextmanager
def process(entry: Entry, code: str, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that runs ``code`` with the same ``entry``; killed at the end."""
    make = f"entry = store.Store(Path({str(entry.path.parents[1])!r})).entry({KEY!r})\n"
    command = [sys.executable, "-c", PREAMBLE + before + "\n" + make + code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def expect(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdout is not None
    assert child.stdout.readline().strip() == line


def never(line: str) -> None:
    raise AssertionError(f"waited: {line}")


def test_a_held_entry_names_its_holder(entry: Entry) -> None:
    with process(entry, HOLD) as holder:
        expect(holder, "held")
        name = f"{KEY[:12]} is in use by process {holder.pid} on {socket.gethostname()}"
        with pytest.raises(BusyError, match=f"^{name}; try again when it is done$"), entry.hold():
            pass
        lines: list[str] = []
        threading.Timer(0.3, holder.kill).start()
        with entry.hold(lines.append):
            assert lines == [f"waiting: {name}"]


def test_a_race_trains_once(entry: Entry) -> None:
    code = """
with entry.hold(lambda line: None):
    if entry.manifest is None:
        entry.begin(fresh=False)
        time.sleep(0.5)
        entry.commit({"stage": "pretrain"})
        say("ran")
    else:
        say("reused")
"""
    with process(entry, code) as a, process(entry, code) as b, process(entry, code) as c:
        said = sorted(child.communicate()[0].strip() for child in (a, b, c))
    assert said == ["ran", "reused", "reused"]


def test_a_killed_holder_frees_the_entry_though_its_children_live(entry: Entry) -> None:
    # As DataLoader workers do: forked while the entry is held, and not yet gone.
    code = """
with entry.hold():
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    say(child)
    time.sleep(60)
"""
    with process(entry, code) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        holder.kill()
        holder.wait()
        try:
            os.kill(worker, 0)
            with entry.hold(never):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_child_that_ends_does_not_free_the_entry(entry: Entry) -> None:
    code = """
with entry.hold():
    child = os.fork()
    if child > 0:
        os.waitpid(child, 0)
        say("held")
        time.sleep(60)
"""
    with process(entry, code) as holder:
        expect(holder, "held")
        with pytest.raises(BusyError), entry.hold():
            pass


def test_a_stopped_holder_keeps_the_entry(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LEASE", 0.5)
    with process(entry, HOLD, before="store.LEASE = 0.5") as holder:
        expect(holder, "held")
        holder.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        with pytest.raises(BusyError), entry.hold():
            pass


ELSEWHERE = "store.LEASE = 0.9\nsocket.gethostname = lambda: 'elsewhere'\n"


def test_a_holder_that_died_on_another_host(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "LEASE", 0.9)
    with process(entry, HOLD, before=ELSEWHERE) as holder:
        expect(holder, "held")
        holder.kill()
        pid = holder.pid
    with pytest.raises(BusyError), entry.hold():
        pass
    lines: list[str] = []
    with entry.hold(lines.append):
        assert lines == [f"waiting: {KEY[:12]} is in use by process {pid} on elsewhere"]


def no_flock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_the_lease_alone_where_the_kernel_lock_is_missing(
    entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LEASE", 0.9)
    monkeypatch.setattr(fcntl, "flock", no_flock)
    before = ELSEWHERE + (
        "import errno, fcntl\n"
        "def no_flock(descriptor, operation): raise OSError(errno.ENOSYS, '')\n"
        "fcntl.flock = no_flock"
    )
    with process(entry, HOLD, before=before) as holder:
        expect(holder, "held")
        time.sleep(1.5)  # longer than the lease, which the holder renews
        with pytest.raises(BusyError, match="on elsewhere"), entry.hold():
            pass
    with entry.hold(lambda line: None), pytest.raises(BusyError), entry.hold():
        pass


def test_ctrl_c_ends_the_wait(entry: Entry) -> None:
    wait = "with entry.hold(say):\n    say('got it')"
    with entry.hold(), process(entry, wait) as waiter:
        expect(
            waiter,
            f"waiting: {KEY[:12]} is in use by process {os.getpid()} on " + socket.gethostname(),
        )
        waiter.send_signal(signal.SIGINT)
        out, err = waiter.communicate()
    assert out == ""
    assert err.strip().endswith("KeyboardInterrupt")
    with entry.hold(never):
        pass


def test_an_error_inside_frees_the_entry(entry: Entry) -> None:
    with pytest.raises(ValueError, match="x"), entry.hold():
        raise ValueError("x")
    with entry.hold(never):
        pass


@pytest.mark.parametrize("moment", ["begin", "file", "commit"])
def test_a_kill_at_any_moment_leaves_a_partial_that_can_be_finished(
    entry: Entry, moment: str
) -> None:
    code = """
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
with entry.hold():
    entry.begin(fresh=True, about={"stage": "joint"})
    MOMENT == "begin" and die()
    (entry.path / "last.pt").write_text("w")
    MOMENT == "file" and die()
    os.replace = os.rename = Path.replace = die
    entry.commit({})
"""
    with process(entry, code, before=f"MOMENT = {moment!r}") as child:
        child.wait()
        assert child.returncode == -signal.SIGKILL
    assert entry.manifest is None
    assert entry.about["stage"] == "joint"
    finish(entry, {"last.pt": "w2"})
    assert entry.damage(thorough=True) is None
    assert tree(entry.path).keys() == {"begun.json", "manifest.json", "last.pt"}
    assert json.loads((entry.path / "manifest.json").read_text())["files"].keys() == {"last.pt"}


@pytest.mark.parametrize("content", ["", "filelock/2\npid=1"])
def test_a_lease_whose_process_was_killed_before_it_wrote_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(store_module, "_UNNAMED", 0.1)
    entry = Store(tmp_path).entry("0" * 32)
    entry.begin(fresh=False)
    entry.path.with_suffix(".lease").write_text(content)
    with entry.hold():  # without on_wait a lease that somebody has raises BusyError
        assert entry.path.with_suffix(".lease").read_text() != content
