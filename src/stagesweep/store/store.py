"""The stage store: every finished stage on disk under its fingerprint, trained once.

Layout::

    <store>/<first two digits>/<fingerprint>/    what the stage left: checkpoints, artifacts ...
        begun.json       who began it: experiment, stage, host, time
        manifest.json    written last: every file with its size and hash; without it the entry is
                         a partial, which a run goes on from
    <store>/<first two digits>/<fingerprint>.lock, .lease    held by the one process at work
    <store>/trash/       entries on their way out

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLease, Timeout

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, explain, explained, is_temporary, link

MANIFEST = "manifest.json"
BEGUN = "begun.json"

# Seconds without a sign of life after which a holder on another host counts as dead; one on this
# host is known to be alive or dead at once.
LEASE = 60.0

# Only folders of these names are ever listed or removed, wherever the store is said to be.
_IS_ENTRY = re.compile(r"[0-9a-f]{32}").fullmatch
_IS_TRASH = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}").fullmatch

_PATIENCE = 0.1  # seconds between looks at a lock that is taken


class BusyError(UserError):
    """Another process is at work on the entry."""


class Store:
    """The folder of all entries; it need not exist yet."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def default(cls) -> "Store":
        """Give the store that STAGESWEEP_STORE names, else .stagesweep/store in this folder."""
        root = Path(os.environ.get("STAGESWEEP_STORE") or ".stagesweep/store")
        return cls(root.expanduser().absolute())

    def entry(self, fingerprint: str) -> "Entry":
        """Give the place of one stage, whether it is there yet or not."""
        return Entry(self.root, fingerprint)

    def entries(self) -> list["Entry"]:
        """Give every finished and partial entry, in the order of their fingerprints."""
        with explained(self.root):
            paths = sorted(self.root.glob("??/*"))
            return [Entry(self.root, p.name) for p in paths if _IS_ENTRY(p.name) and p.is_dir()]

    def empty_trash(self) -> None:
        """Delete what a killed process had only begun to delete."""
        for path in self.root.glob("trash/*"):
            if _IS_TRASH(path.name):
                shutil.rmtree(path, ignore_errors=True)


class Entry:
    """One stage in the store. Change it only inside :meth:`hold`."""

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.path = root / fingerprint[:2] / fingerprint
        self._trash = root / "trash"

    # What is there.

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What :meth:`commit` wrote; None while unfinished, or if it is truncated or foreign."""
        content = _read_json(self.path / MANIFEST)
        try:
            for record in content["files"].values():
                int(record["size"]), str(record["sha256"])
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return content

    @property
    def about(self) -> dict[str, Any]:
        """The manifest when finished, else what :meth:`begin` noted; empty when unknown."""
        return self.manifest or _read_json(self.path / BEGUN)

    def size(self) -> int:
        """Add up the bytes of all files."""
        return sum(status.st_size for status in self._stats())

    def used(self) -> float:
        """Give the time it was last written to or reused, in seconds since 1970 (0: not there)."""
        with suppress(OSError):
            return (self.path / MANIFEST).stat().st_mtime
        return max((status.st_mtime for status in self._stats()), default=0.0)

    def damage(self, thorough: bool = False) -> str | None:
        """Say what is wrong with a finished entry, None when nothing is.

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

    # Working on it.

    @contextmanager
    def hold(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Be the only process at work on this entry, waiting while another one is.

        ``on_wait`` is called once, with a line naming the holder, when there is something to wait
        for; without it there is no waiting. After a wait look at :attr:`manifest` again: most
        likely the holder has finished the stage. Ctrl-C ends the wait.

        Two locks are taken. The kernel's is exact: it is free the moment its holder dies, stays
        held however long a living holder is stopped, and forked children do not keep it. But not
        every network file system carries it to other hosts. So a lease is taken as well: a file
        that names its holder and that the holder renews; it is void when the holder is dead, or
        silent for ``LEASE`` seconds on another host.

        An entry held elsewhere is a BusyError when there is no ``on_wait``; a store that cannot be
        written is a UserError.
        """
        native = FileLock(self._beside(".lock"), fallback_to_soft=False)
        lease = SoftFileLease(self._beside(".lease"), lease_duration=LEASE)
        with ExitStack() as stack:
            for lock in (native, lease):
                if native.is_locked and _holder(lease)[1] == socket.gethostname():
                    lease.force_break()  # of a process that is dead, though perhaps not buried
                try:
                    stack.enter_context(lock.acquire(timeout=_PATIENCE))
                except Timeout:
                    pid, host = _holder(lease)
                    holder = f"{self.fingerprint[:12]} is in use by process {pid} on {host}"
                    if on_wait is None:
                        raise BusyError(f"{holder}; try again when it is done") from None
                    on_wait(f"waiting: {holder}")
                    on_wait = _ignore
                    stack.enter_context(lock.acquire(poll_interval=_PATIENCE))
                except OSError as error:
                    if error.errno != errno.ENOSYS:  # no such lock here: the lease alone decides
                        raise explain(error, self.path) from error
            stack.callback(self._tidy, lease)
            yield

    def begin(self, fresh: bool, about: Mapping[str, object] | None = None) -> None:
        """Make the folder ready to be worked in; from here on the entry is unfinished.

        ``fresh`` first removes all that is there; otherwise a partial keeps its files, but for
        those that a killed process left half-written. ``about`` (experiment, stage) is what
        ``stagesweep-store ls`` says of a partial.
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
        """Declare the entry finished and give its manifest.

        ``manifest`` is plain data for JSON: ``experiment``, ``stage``, ``seconds`` and whatever
        the run needs again (metrics). Added here: files with size and sha256, host and time
        of creation.
        """
        with explained(self.path):
            files = {
                name: {"size": path.stat().st_size, "sha256": _sha256(path)}
                for name, path in self._files()
            }
        return self._write(MANIFEST, {**manifest, "files": files})

    def touch(self) -> None:
        """Note that the entry was used now, for pruning by age."""
        with suppress(OSError):  # a store that others own can still be reused
            os.utime(self.path / MANIFEST)

    def publish(self, target: Path) -> None:
        """Give every file of the entry a second name below ``target`` (a hard link, or a copy).

        A file written in place under one name changes under the other: replace it instead, as
        :func:`stagesweep.base.files.atomic_write` does.
        """
        for name, path in self._files():
            link(path, target / name)

    def discard(self) -> None:
        """Remove the entry, if it is there: in one step for all who look, then from the disk."""
        trash = self._trash / f"{self.fingerprint}-{secrets.token_hex(8)}"
        with explained(self.path):
            if self.path.exists():
                self._trash.mkdir(exist_ok=True)
                self.path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _beside(self, suffix: str) -> Path:
        # Beside the folder and not in it: the folder can be thrown away while the lock is held.
        return self.path.with_name(self.path.name + suffix)

    def _tidy(self, lease: SoftFileLease) -> None:
        """Leave no lock file of an entry that is gone; whoever waits for it makes a new one."""
        # A forked child that leaves the block holds nothing, and the lock is its parent's.
        if lease.is_locked and not self.path.exists():
            with suppress(OSError):
                self._beside(".lock").unlink()

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Give the name in the entry and the path of every file that the stage left."""
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
    """Say nothing a second time."""


def _holder(lease: SoftFileLease) -> tuple[str, str]:
    """Give the process and the host that a lease names."""
    if (owner := lease.owner) is None:
        return "?", "?"
    return str(owner.pid), owner.hostname.partition("?")[0]  # what follows tells containers apart


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; one that is missing or broken is empty."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
