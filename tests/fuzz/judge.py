"""What an answer of the command may look like."""

import csv
import json
import re
import signal
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import yaml

from stagesweep.base.files import is_temporary
from stagesweep.store.store import Store

# "UserWarning: ..." as Python prints it; lines of a log say WARNING.
WARNING = re.compile(r"\b[A-Z][a-z]\w*Warning: .*")
# What a run that was stopped, or did not do its work, ends with.
STOPPED = (130, 138, 143)


class Fault(Exception):
    """An answer that is neither correct work nor one line and a non-zero status."""


def judge(process: "CompletedProcess[str]", folder: Path) -> str:
    """Return ``ran``, ``refused`` or ``stopped``; raises Fault."""
    status, errors = process.returncode, process.stderr.strip()
    look(process.stdout + process.stderr)
    for file in folder.rglob("*.log"):
        if file.is_file():
            look(file.read_text(errors="replace"), f" (in {file.relative_to(folder)})")
    whole(folder)
    if status == 0:
        return "ran"
    if status == 2 and errors.startswith("usage:"):
        return "refused"
    if status == -signal.SIGTERM:  # asked to stop while Python ended, when its work was done
        return "stopped"
    if status not in (1, *STOPPED):
        raise Fault(f"status {status}")
    lines = [line for line in errors.splitlines() if line.strip()]
    if len(lines) != 1 or not lines[0].startswith(("stagesweep", "usage:")):
        raise Fault(f"{len(lines)} lines on stderr, not one of stagesweep")
    if len(lines[0]) > 2000:
        raise Fault(f"a line of {len(lines[0])} characters")
    return "stopped" if status in STOPPED else "refused"


def look(text: str, where: str = "") -> None:
    """Raise Fault for a traceback or the warning of a library."""
    if "Traceback (most recent call last)" in text:
        raise Fault(f"a traceback{where}")
    if found := WARNING.search(text):
        raise Fault(f"a warning{where}: {found[0]}")


def whole(folder: Path) -> None:
    """Raise Fault for a file that is half-written: what is left can be read."""
    for file in folder.rglob("*"):
        if is_temporary(file):
            raise Fault(f"a temporary file is left: {file.relative_to(folder)}")


def readable(folder: Path) -> None:
    """Raise Fault unless every result of runs in a folder can be read."""
    for file in folder.rglob("*"):
        if not file.is_file() or file.is_symlink():
            continue
        try:
            match file.suffix:
                case ".json":
                    json.loads(file.read_text())
                case ".jsonl":
                    [json.loads(line) for line in file.read_text().splitlines()]
                case ".yaml":
                    yaml.safe_load(file.read_text())
                case ".csv":
                    list(csv.reader(file.read_text().splitlines(), strict=True))
                case ".npz":
                    with np.load(file) as arrays:
                        dict(arrays)
        except Exception as error:
            raise Fault(f"{file.relative_to(folder)} is half-written: {error}") from error


def sound(store: Path) -> None:
    """Raise Fault for a finished entry of the store that does not hold what it says."""
    for entry in Store(store).entries():
        if entry.manifest is not None and (damage := entry.damage(thorough=True)):
            raise Fault(f"a damaged entry of the store is left: {damage}")
