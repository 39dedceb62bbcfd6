import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, atomic_write, file_error, is_temporary, link
from stagesweep.store.store import Store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_bytes_and_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    atomic_write(path, lambda stream: stream.write(b"one"))
    atomic_write(path, lambda stream: stream.write(b"two"))
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.bin"]


def test_text_is_utf8(tmp_path: Path) -> None:
    atomic_text(tmp_path / "t", "Grüße ✓\n")
    assert (tmp_path / "t").read_bytes() == "Grüße ✓\n".encode()


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    atomic_text(tmp_path / ("n" * 255), "x")
    assert names(tmp_path) == ["n" * 255]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "f"
    atomic_text(path, "old")

    def half(stream: BinaryIO) -> None:
        stream.write(b"half of the ne")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, half)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_a_killed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    atomic_text(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from stagesweep.base.files import *\n"
        "def half(s): s.write(b'half'); s.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(Path(sys.argv[1]), half)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    leftover = [p for p in tmp_path.iterdir() if p != path]
    assert len(leftover) == 1
    assert is_temporary(leftover[0])
    assert not is_temporary(path)


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk: Path) -> None:
    path = small_disk / "weights.pt"
    atomic_text(path, "old")
    with pytest.raises(UserError) as caught:
        atomic_write(path, lambda stream: stream.write(bytes(2_000_000)))
    assert str(caught.value) == (
        f"disk full: cannot write {path} (1.0 MB free); free space, "
        "or set STAGESWEEP_STORE or hydra.run.dir to another place"
    )
    assert path.read_text() == "old"
    assert names(small_disk) == ["weights.pt"]


def test_a_full_disk_behind_another_error_is_found(small_disk: Path) -> None:
    # torch.save raises RuntimeError while it closes its archive after a failed write.
    def save(stream: BinaryIO) -> None:
        try:
            stream.write(bytes(2_000_000))
            stream.flush()
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(UserError, match=r"^disk full"):
        atomic_write(small_disk / "weights.pt", save)
    assert names(small_disk) == []


def test_a_full_disk_leaves_the_stage_unfinished(small_disk: Path) -> None:
    entry = Store(small_disk / "store").entry("0" * 32)
    with entry.hold():
        entry.begin(fresh=True)
        (entry.path / "checkpoint.pt").write_bytes(b"x")
        with (small_disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        with pytest.raises(UserError, match=r"^disk full: cannot write .*manifest.json \(0.0 MB"):
            entry.commit({"stage": "pretrain"})
    assert entry.manifest is None
    assert names(entry.path) == ["begun.json", "checkpoint.pt"]


def test_other_errors_are_unchanged(tmp_path: Path) -> None:
    def read_first(stream: BinaryIO) -> None:
        try:
            (tmp_path / "missing").open()
        except FileNotFoundError:
            raise ValueError("no input") from None

    with pytest.raises(ValueError, match=r"no input"):
        atomic_write(tmp_path / "f", read_first)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    atomic_text(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"^cannot use .*file/x: .*; check the disk, or set "):
        atomic_text(tmp_path / "file" / "x", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"^no permission for .*; change the rights of its folder"):
        atomic_text(tmp_path / "f", "")


@pytest.mark.parametrize(
    ("number", "start"),
    [
        (errno.ENOSPC, "disk full: cannot write "),
        (errno.EDQUOT, "disk full: cannot write "),
        (errno.EACCES, "no permission for "),
        (errno.EPERM, "no permission for "),
        (errno.EROFS, "read-only file system: cannot write "),
        (errno.ENOENT, "no such file: "),
        (errno.EIO, "cannot use "),
    ],
)
def test_every_refusal_is_one_line_with_path_and_remedy(
    tmp_path: Path, number: int, start: str
) -> None:
    path = tmp_path / "f"
    text = str(file_error(OSError(number, os.strerror(number)), path))
    assert text.startswith(f"{start}{path}")
    assert "; " in text
    assert "\n" not in text


def test_link_is_the_same_file(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "deep" / "t"
    source.write_bytes(b"new")
    link(source, target)
    assert target.samefile(source)
    assert names(target.parent) == ["t"]


def test_link_replaces_and_may_be_repeated(tmp_path: Path) -> None:
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    for _ in range(2):
        link(source, target)
        assert target.samefile(source)
        assert names(tmp_path) == ["s", "t"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_copies_where_it_cannot_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    link(source, target)
    assert target.read_bytes() == b"new"
    assert not target.samefile(source)
    assert names(tmp_path) == ["s", "t"]


def test_copies_to_another_file_system(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "s").write_bytes(b"new")
    link(tmp_path / "s", small_disk / "t")
    assert (small_disk / "t").read_bytes() == b"new"


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no such file: .*/missing; "):
        link(tmp_path / "missing", tmp_path / "t")
    assert names(tmp_path) == []


@settings(max_examples=30)
@given(content=st.binary(max_size=2000), parts=st.integers(1, 5))
def test_bytes_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, parts: int
) -> None:
    path = tmp_path_factory.mktemp("d") / "f"

    def write(stream: BinaryIO) -> None:
        for start in range(parts):
            stream.write(content[start * 500 : (start + 1) * 500])

    atomic_write(path, write)
    assert path.read_bytes() == content[: parts * 500]
