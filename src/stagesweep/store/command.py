"""The command ``stagesweep-store``: list, prune and verify the stage store."""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from stagesweep.base.errors import UserError
from stagesweep.store.store import BusyError, Entry, Store

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {
    f"{prefix}{middle}b": base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for middle, base in (("", 1000), ("i", 1024))
}


@dataclass(frozen=True)
class Row:
    """One entry, as it is listed; times in seconds since 1970."""

    entry: Entry
    state: str
    experiment: str
    stage: str
    size: int
    created: float
    used: float

    @property
    def name(self) -> str:
        """Short fingerprint, experiment and stage, for messages."""
        return f"{self.entry.fingerprint[:12]}  {self.experiment}/{self.stage}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        store = Store(Path(options.store).absolute()) if options.store else Store.default()
        status: int = options.run(store, options)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"stagesweep-store: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `stagesweep-store ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagesweep-store", description="List, prune and verify the store of finished stages."
    )
    commands = parser.add_subparsers(required=True, metavar="ls | prune | verify")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store",
        metavar="DIR",
        help="the store (default: $STAGESWEEP_STORE, else .stagesweep/store in this folder)",
    )

    ls = commands.add_parser(
        "ls", parents=[common], help="list the entries, most recently used first"
    )
    ls.add_argument("--json", action="store_true", help="print JSON for scripts")
    ls.set_defaults(run=_ls)

    prune = commands.add_parser(
        "prune",
        parents=[common],
        help="remove entries by age, state and size",
        description="Remove entries. An entry that a run is working on is always kept.",
    )
    prune.add_argument(
        "--older-than",
        type=_duration,
        metavar="AGE",
        help="remove entries not used for this long: 30d, 12h",
    )
    prune.add_argument(
        "--partial", action="store_true", help="remove entries that are not finished"
    )
    prune.add_argument(
        "--max-size",
        type=_size,
        metavar="SIZE",
        help="then remove the least recently used, until the store fits: 20GB",
    )
    prune.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    prune.set_defaults(run=_prune)

    verify = commands.add_parser(
        "verify", parents=[common], help="compare every file with its hash"
    )
    verify.add_argument("--repair", action="store_true", help="remove the damaged entries")
    verify.set_defaults(run=_verify)
    return parser


def _ls(store: Store, options: argparse.Namespace) -> int:
    rows = sorted(_rows(store), key=lambda row: row.used, reverse=True)
    if options.json:
        print(json.dumps([_plain(row) for row in rows], indent=1))
        return 0
    if not rows:
        return _report_empty(store)
    now = time.time()
    header = ("FINGERPRINT", "EXPERIMENT", "STAGE", "STATE", "SIZE", "AGE", "LAST USED")
    table = [header] + [
        (
            row.entry.fingerprint[:12],
            row.experiment,
            row.stage,
            row.state,
            _format_size(row.size),
            _format_duration(now - row.created),
            _format_duration(now - row.used) + " ago",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        aligned = [
            cell.rjust(width) if title in ("SIZE", "AGE", "LAST USED") else cell.ljust(width)
            for title, cell, width in zip(header, cells, widths, strict=True)
        ]
        print("  ".join(aligned).rstrip())
    print(f"{_count(rows)}, {_format_size(_total(rows))}, in {store.root}")
    return 0


def _prune(store: Store, options: argparse.Namespace) -> int:
    if options.older_than is None and options.max_size is None and not options.partial:
        raise UserError("nothing to prune by; give --older-than, --max-size or --partial")
    now = time.time()
    older_than = math.inf if options.older_than is None else options.older_than
    max_size = math.inf if options.max_size is None else options.max_size

    def due(row: Row) -> bool:
        return now - row.used > older_than or (options.partial and row.state == "partial")

    rows = sorted(_rows(store), key=lambda row: (not due(row), row.used))
    if not rows:
        return _report_empty(store)
    left = _total(rows)
    removed: list[Row] = []
    for row in rows:
        if not due(row) and left <= max_size:
            break
        if options.dry_run or _remove(row):
            removed.append(row)
            left -= row.size
            verb = "would remove" if options.dry_run else "removed"
            unused = _format_duration(now - row.used)
            print(f"{verb}  {row.name}  {row.state}, {_format_size(row.size)}, unused for {unused}")
    if not options.dry_run:
        store.empty_trash()
    verb = "would free" if options.dry_run else "freed"
    print(f"{verb} {_format_size(_total(removed))} ({_count(removed)}); {_format_size(left)} left")
    return 0


def _verify(store: Store, options: argparse.Namespace) -> int:
    rows = [row for row in _rows(store) if row.state == "finished"]
    if not rows:
        return _report_empty(store)
    damaged = 0
    for row in rows:
        if (damage := row.entry.damage(thorough=True)) is None:
            continue
        repaired = options.repair and _remove(row)
        damaged += not repaired
        print(f"{'removed' if repaired else 'damaged'}  {row.name}  {damage}")
    print(f"read {_count(rows)}, {_format_size(_total(rows))}; {damaged or 'none'} damaged")
    return 1 if damaged else 0


def _remove(row: Row) -> bool:
    """Remove an entry, unless it is in use or was used since it was listed."""
    try:
        with row.entry.hold():
            if row.entry.used() > row.used:
                raise BusyError("used a moment ago")
            row.entry.discard()
            return True
    except BusyError as busy:
        print(f"kept  {row.name}  {busy}")
        return False


def _rows(store: Store) -> list[Row]:
    return [_row(entry) for entry in store.entries()]


def _row(entry: Entry) -> Row:
    about = entry.about
    used = entry.used()
    try:
        created = datetime.fromisoformat(str(about.get("created"))).timestamp()
    except ValueError:
        created = used
    return Row(
        entry=entry,
        state=_state(entry),
        experiment=str(about.get("experiment", "?")),
        stage=str(about.get("stage", "?")),
        size=entry.size(),
        created=created,
        used=used,
    )


def _state(entry: Entry) -> str:
    if entry.manifest is not None:
        return "finished"
    try:
        with entry.hold():
            return "partial"
    except BusyError:
        return "running"
    except UserError:  # a store without write permission
        return "partial"


def _plain(row: Row) -> dict[str, object]:
    return {
        "fingerprint": row.entry.fingerprint,
        "experiment": row.experiment,
        "stage": row.stage,
        "state": row.state,
        "bytes": row.size,
        "created": _iso(row.created),
        "used": _iso(row.used),
        "path": str(row.entry.path),
    }


def _report_empty(store: Store) -> int:
    print(f"no stages in {store.root}")
    return 0


def _total(rows: Sequence[Row]) -> int:
    return sum(row.size for row in rows)


def _count(rows: Sequence[Row]) -> str:
    return f"{len(rows)} {'entry' if len(rows) == 1 else 'entries'}"


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _format_size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _format_duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _size(text: str) -> float:
    return _quantity(text, _BYTES, "20GB, 500MB or 1.5GiB")


def _duration(text: str) -> float:
    return _quantity(text, _SECONDS, "30d, 12h, 90min or 2w")


def _quantity(text: str, units: dict[str, int], examples: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not like {examples}")
    return float(match[1]) * units[match[2]]


if __name__ == "__main__":
    sys.exit(main())
