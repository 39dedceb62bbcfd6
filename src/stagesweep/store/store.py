"""The stage store: finished stages on disk by fingerprint, so that none is trained twice.

Layout::

    <store>/<first two digits>/<fingerprint>/    files of the stage: checkpoints, artifacts ...
        begun.json       experiment, stage, host and time of the start
        manifest.json    written last: every file with its size and hash. An entry without it is
                         partial, and a run resumes it
    <store>/<first two digits>/<fingerprint>.lock, .lease    held while a process works on it
    <store>/trash/       entries that are being deleted

Use, with ``entry = Store.default().entry(fingerprint)``::

    with entry.hold(log.info):
        damage = entry.damage()
        if entry.manifest is None or damage:
            entry.begin(fresh=bool(damage), about={"experiment": ..., "stage": ...})
            ...  # train, writing into entry.path
            entry.commit({"experiment": ..., "stage": ..., "seconds": ..., "metrics": ...})
        else:
            entry.touch()
        entry.publish(folder_of_the_run)
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLease, Timeout

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, explained, file_error, is_temporary, link

MANIFEST = "manifest.json"
BEGUN = "begun.json"

# Seconds without a renewal after which a holder on another host counts as dead. Of a holder on
# this host it is known at once.
LEASE = 60.0

# Only folders with these names are listed or removed: STAGESWEEP_STORE may name any folder.
_IS_ENTRY = re.compile(r"[0-9a-f]{32}").fullmatch
_IS_TRASH = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}").fullmatch

_POLL = 0.1  # seconds between two tries to take a lock
_UNNAMED = 5.0  # seconds in which a holder on any host has written its name into its lease


class BusyError(UserError):
    """Another process is working on the entry."""


class Store:
    """The folder of all entries, which need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def default(cls) -> "Store":
        """The store that STAGESWEEP_STORE names, else .stagesweep/store in the working folder."""
        root = Path(os.environ.get("STAGESWEEP_STORE") or ".stagesweep/store")
        return cls(root.expanduser().absolute())

    def entry(self, fingerprint: str) -> "Entry":
        """The entry of one stage, whether it exists or not."""
        return Entry(self.root, fingerprint)

    def entries(self) -> list["Entry"]:
        """Every finished and partial entry, in the order of fingerprints."""
        with explained(self.root):
            paths = sorted(self.root.glob("??/*"))
            return [Entry(self.root, p.name) for p in paths if _IS_ENTRY(p.name) and p.is_dir()]

    def empty_trash(self) -> None:
        """Delete what a process was deleting when it was killed."""
        for path in self.root.glob("trash/*"):
            if _IS_TRASH(path.name):
                shutil.rmtree(path, ignore_errors=True)


class Entry:
    """One stage in the store. Change it only inside :meth:`hold`."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.path = root / fingerprint[:2] / fingerprint
        self._trash = root / "trash"

    # Reading.

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What :meth:`commit` wrote; None if the entry is not finished, or its manifest damaged."""
        content = _read_json(self.path / MANIFEST)
        try:
            for record in content["files"].values():
                int(record["size"]), str(record["sha256"])
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return content

    @property
    def about(self) -> dict[str, Any]:
        """The manifest of a finished entry, else what :meth:`begin` wrote; empty if unknown."""
        return self.manifest or _read_json(self.path / BEGUN)

    def size(self) -> int:
        """Total size of all files, in bytes."""
        return sum(status.st_size for status in self._stats())

    def used(self) -> float:
        """Time of the last write or reuse, in seconds since 1970; 0 if it does not exist."""
        with suppress(OSError):
            return (self.path / MANIFEST).stat().st_mtime
        return max((status.st_mtime for status in self._stats()), default=0.0)

    def damage(self, thorough: bool = False) -> str | None:
        """Describe the first damage of a finished entry; None if there is none.

        Compares the size of every file with the manifest; ``thorough`` reads every byte and
        compares the hash too.
        """
        for name, record in (self.manifest or {"files": {}})["files"].items():
            path = self.path / name
            try:
                if path.stat().st_size != record["size"]:
                    return f"{name} has {path.stat().st_size} bytes, not {record['size']}"
                if thorough and _sha256(path) != record["sha256"]:
                    return f"{name} has changed since it was written"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None

    # Writing.

    @contextmanager
    def hold(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Lock the entry for this process; wait while another process holds it.

        ``on_wait`` is called once, with a line that names the holder, before a wait. Read
        :attr:`manifest` again afterwards: the holder has probably finished the stage. Ctrl-C ends
        the wait. Without ``on_wait`` an entry that is held raises BusyError instead. A store that
        cannot be written raises UserError.

        Two locks are taken. The kernel's lock is exact: it is released at once when its holder
        dies, stays with a holder that is stopped, and is not kept by forked children. Some network
        file systems do not share it with other hosts, so a lease is taken as well: a file with the
        name of its holder, who renews it. A lease is void when its holder is dead, or has not
        renewed it for ``LEASE`` seconds on another host.
        """
        native = FileLock(self._beside(".lock"), fallback_to_soft=False)
        lease = SoftFileLease(self._beside(".lease"), lease_duration=LEASE)
        with ExitStack() as stack:
            for lock in (native, lease):
                if native.is_locked and _is_left_over(lease):
                    lease.force_break()
                try:
                    stack.enter_context(lock.acquire(timeout=_POLL))
                except Timeout:
                    pid, host = _holder(lease)
                    holder = f"{self.fingerprint[:12]} is in use by process {pid} on {host}"
                    if on_wait is None:
                        raise BusyError(f"{holder}; try again when it is done") from None
                    on_wait(f"waiting: {holder}")
                    on_wait = _ignore
                    stack.enter_context(lock.acquire(poll_interval=_POLL))
                except OSError as error:
                    if error.errno != errno.ENOSYS:  # no kernel locks here: the lease has to do
                        raise file_error(error, self.path) from error
            stack.callback(self._tidy, lease)
            yield

    def begin(self, fresh: bool, about: Mapping[str, object] | None = None) -> None:
        """Prepare the folder for a stage that starts; the entry is partial from now on.

        ``fresh`` removes all files first. Otherwise the files of a partial entry are kept, except
        those that a killed process has left half-written. ``about`` (experiment, stage) is shown
        by ``stagesweep-store ls``.
        """
        if fresh:
            self.discard()
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / MANIFEST).unlink(missing_ok=True)
            for path in self.path.rglob("*"):
                if is_temporary(path):
                    path.unlink()
        self._write(BEGUN, about or {})

    def commit(self, manifest: Mapping[str, object]) -> dict[str, Any]:
        """Mark the entry as finished; return its manifest.

        ``manifest`` is plain data for JSON: ``experiment``, ``stage``, ``seconds``, and what a run
        that reuses the stage needs (metrics). The files with size and sha256, the host and the
        time are added.
        """
        with explained(self.path):
            files = {
                name: {"size": path.stat().st_size, "sha256": _sha256(path)}
                for name, path in self._files()
            }
        return self._write(MANIFEST, {**manifest, "files": files})

    def touch(self) -> None:
        """Set the time of last use to now, for pruning by age."""
        with suppress(OSError):  # a store without write permission can still be read
            os.utime(self.path / MANIFEST)

    def publish(self, target: Path) -> None:
        """Link (or copy) every file of the entry to the folder ``target``.

        A linked file must not be written in place, which changes both: replace it, as
        :func:`stagesweep.base.files.atomic_write` does.
        """
        for name, path in self._files():
            link(path, target / name)

    def discard(self) -> None:
        """Remove the entry if it exists; renamed first, so that no process sees a part of it."""
        trash = self._trash / f"{self.fingerprint}-{secrets.token_hex(8)}"
        with explained(self.path):
            if self.path.exists():
                self._trash.mkdir(exist_ok=True)
                self.path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _beside(self, suffix: str) -> Path:
        # Beside the folder and not in it: the folder may be removed while the lock is held.
        return self.path.with_name(self.path.name + suffix)

    def _tidy(self, lease: SoftFileLease) -> None:
        """Remove the lock file of an entry that was removed; the next holder makes a new one."""
        # A forked child that leaves the block does not hold the lock: its parent does.
        if lease.is_locked and not self.path.exists():
            with suppress(OSError):
                self._beside(".lock").unlink()

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield the name in the entry, and the path, of every file of the stage."""
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and name not in (MANIFEST, BEGUN) and not is_temporary(path):
                yield name, path

    def _stats(self) -> Iterator[os.stat_result]:
        with suppress(OSError):  # another process may be removing it
            for path in self.path.rglob("*"):
                if path.is_file():
                    yield path.stat()

    def _write(self, name: str, content: Mapping[str, object]) -> dict[str, Any]:
        record = {
            "fingerprint": self.fingerprint,
            **content,
            "host": socket.gethostname(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        atomic_text(self.path / name, json.dumps(record, indent=1))
        return record


def _ignore(_: str) -> None:
    """Called instead of ``on_wait`` after the first time."""


def _is_left_over(lease: SoftFileLease) -> bool:
    """Whether a lease has no living holder, seen by the process that has the kernel's lock.

    A holder on this host would have that lock. A lease without a name is that of a process that
    was killed before it wrote it, unless the name comes in a moment.
    """
    until = time.monotonic() + _UNNAMED
    while (host := _holder(lease)[1]) == "?" and Path(lease.lock_file).exists():
        if time.monotonic() > until:
            return True
        time.sleep(_POLL / 10)
    return host == socket.gethostname()


def _holder(lease: SoftFileLease) -> tuple[str, str]:
    """The process id and the host in a lease."""
    if (owner := lease.owner) is None:
        return "?", "?"
    return str(owner.pid), owner.hostname.partition("?")[0]  # what follows identifies the container


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; empty if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
