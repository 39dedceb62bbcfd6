"""SIGKILL at random moments of a sweep with a pruner: of a trial, the fork server, the controller.

The moments are spread over the sweep: each is a random time after a number of trials have finished.
A controller that was killed is started again with the same command. Finished results must stay
unchanged; in the end every point is finished once, as in an undisturbed sweep.
"""

import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.sweep.lab import Lab, describe_machine, lab, options, verdict

FINISHED = ("COMPLETE", "PRUNED", "FAIL")
VICTIMS = ("trial", "server", "controller")
Finished = dict[int, tuple[str, float | None]]


def main(argv: Sequence[str]) -> int:
    """Kill processes, print a line for each, and print which checks hold."""
    given = options(__doc__, argv, kills=(30, 3), trials=(24, 4), seed=(0, 0))
    chance = random.Random(given.seed)
    values = chance.sample(range(given.trials), given.trials)
    overrides = (
        f"stage.toy.x={','.join(map(str, values))}",
        f"stage.toy.seconds={0.5 if given.small else 1.5}",
        "stage.toy.steps=4",
        "search/pruner=median",
        "search.max_retries=100",
        "sweep.slots=2",
    )
    print(describe_machine())
    with lab() as here:
        monitor = SweepMonitor(here)
        process = here.start(*overrides)
        killed = dict.fromkeys(VICTIMS, 0)
        for n in range(given.kills):
            due = int(n / given.kills * 0.9 * given.trials)
            process = until(
                lambda due=due: len(monitor.finished()) >= due, process, here, overrides
            )
            time.sleep(chance.uniform(0, 2))
            process, kind = kill_one(chance, monitor, process, here, overrides)
            if kind is None:
                continue
            killed[kind] += 1
            if kind == "controller":
                process.wait()
                process = here.start(*overrides)
            print(f"{n + 1:3}. {kind:10} {len(monitor.finished()):3} trials finished", flush=True)
        ended = process.wait()
        if ended != 0:
            ended = here.start(*overrides).wait()
        time.sleep(0.5)
        until_gone = time.monotonic() + 30
        while monitor.all() and time.monotonic() < until_gone:
            time.sleep(0.1)
        trials = here.study.trials
        done = [t for t in trials if t.state.name in ("COMPLETE", "PRUNED")]
        points = sorted(t.params["stage.toy.x"] for t in trials)
        monitor.finished()
        print(f"{sum(killed.values())} kills: {killed}; the toy ended {len(here.calls)} times")
        status = verdict(
            (ended == 0, f"the last command ended with status {ended}"),
            (len(done) == len(trials) == given.trials, f"{len(done)} of {len(trials)} finished"),
            (not monitor.faults, f"no finished result changed or lost {monitor.faults or ''}"),
            (
                len({t.number for t in trials}) == len(trials)
                and all(t.value in (None, t.params["stage.toy.x"]) for t in trials),
                "every number is one trial, with the value of its own point",
            ),
            (not monitor.all(), f"no orphan process {monitor.all() or ''}"),
        )
    with lab() as here:
        quiet = [o for o in overrides if not o.startswith("stage.toy.seconds")]
        here.sweep(*quiet)
        same = points == sorted(t.params["stage.toy.x"] for t in here.study.trials)
    return verdict((same, "the points of an undisturbed sweep")) or status


def kill_one(
    chance: random.Random,
    monitor: "SweepMonitor",
    process: "subprocess.Popen[bytes]",
    here: Lab,
    overrides: Sequence[str],
) -> tuple["subprocess.Popen[bytes]", str | None]:
    """Kill a random process. Returns the running command, and the kind that was killed, if any."""
    kind, pid = "", None
    while pid is None:  # none of a kind while the command starts or ends
        if process.poll() is not None:
            process = here.start(*overrides)
        kind = chance.choice(VICTIMS)
        pid = chance.choice(monitor.processes(process.pid)[kind] or [None])
        time.sleep(0.01)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return process, None
    return process, kind


def until(
    condition: Callable[[], bool],
    process: "subprocess.Popen[bytes]",
    here: Lab,
    overrides: Sequence[str],
) -> "subprocess.Popen[bytes]":
    """Wait for the condition; restart the command if it ends. Returns the running command."""
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the sweep makes no progress")
        if process.poll() is not None:
            process = here.start(*overrides)
        time.sleep(0.05)
    return process


class SweepMonitor:
    """Reads the study of a sweep and finds its processes."""

    def __init__(self, here: Lab) -> None:
        self.store = str(here.folder / "store")
        self.file = here.folder / "sweep" / "study.db"
        self.known: Finished = {}
        self.faults: list[Any] = []

    def finished(self) -> Finished:
        """State and value of each finished trial; records results that have changed."""
        query = "select number, state, value from trials left join trial_values using (trial_id)"
        try:
            with closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)) as database:
                rows = database.execute(query).fetchall()
        except sqlite3.OperationalError:  # not there yet, or being written
            return self.known
        found = {n: (state, value) for n, state, value in rows if state in FINISHED}
        self.faults += [
            (n, was, found.get(n)) for n, was in self.known.items() if found.get(n) != was
        ]
        self.known = found
        return found

    def all(self) -> list[int]:
        """Every process of the sweep."""
        entries = (entry for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [int(entry.name) for entry in entries if self.store in environment(entry)]

    def processes(self, controller: int) -> dict[str, list[int]]:
        """The processes that may be killed, by kind."""
        parents = {pid: parent(pid) for pid in self.all()}
        servers = [
            pid for pid in parents if parents[pid] == controller and "forkserver" in command(pid)
        ]
        trials = [pid for pid in parents if parents[pid] in servers]
        return {"trial": trials, "server": servers, "controller": [controller]}


def environment(process: Path) -> str:
    """The environment of a running process; empty for one that has ended."""
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else (process / "environ").read_text(errors="replace")
    except OSError:
        return ""


def parent(pid: int) -> int | None:
    """The parent of a process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def command(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""
