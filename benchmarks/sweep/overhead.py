"""Overhead of an empty trial: ours, and the stock sweeper with its basic launcher and with joblib.

Every trial composes the config of digits (without its stages), validates it, and runs one stage
that returns a number. Ours: two slots, a process for each trial. Basic: all trials in one process,
one after the other. Joblib: batches of two in two processes that are reused.

The CPU time of the controller is that of its own process, by ``getrusage``: of its loop, from the
first proposal to the last end, and of the rest (imports, composing, checks; tables and report).
"""

import json
import statistics
from collections.abc import Sequence

from benchmarks.sweep.lab import STOCK, describe_machine, lab, options, verdict

# The real command, which records its CPU time before and after the loop.
TIMED = """
import json, sys
from pathlib import Path
from time import process_time
from stagesweep.cli import main
from stagesweep.sweep.engine.controller import Controller

loop = Controller.run

def timed(self):
    before = process_time()
    loop(self)
    Path("cpu.json").write_text(json.dumps([before, process_time()]))

Controller.run = timed
main()
"""
SPACE = ("search=random", "search/space=none", "stage.toy.x=interval(0.0,1.0)")


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    given = options(__doc__, argv, trials=(100, 6), rounds=(3, 1))
    n = given.trials
    stock = (*SPACE, *STOCK, f"hydra.sweeper.n_trials={n}")
    ways = {
        "ours": (*SPACE, f"search.n_trials={n}", "sweep.slots=2"),
        "basic": (*stock, "hydra.sweeper.n_jobs=1", "hydra/launcher=basic"),
        "joblib": (*stock, "hydra.sweeper.n_jobs=2", "hydra/launcher=joblib"),
    }
    ways["joblib"] += ("hydra.launcher.n_jobs=2",)
    print(describe_machine())
    print(f"{n} trials, {given.rounds} rounds in turns, medians")
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    loops, rests = [], []
    for _ in range(given.rounds):
        for name, overrides in ways.items():
            with lab() as here:
                program = ("-c", TIMED) if name == "ours" else ("-m", "stagesweep")
                spent = here.sweep(*overrides, program=program)
                assert len(here.calls) == n
                wall[name].append(spent.wall)
                cpu[name].append(spent.cpu)
                if name == "ours":
                    before, after = json.loads((here.folder / "cpu.json").read_text())
                    loops.append(after - before)
                    rests.append(before)
    print(f"{'':8}{'wall':>10}{'a trial':>12}{'CPU':>10}{'a trial':>12}{'ours/it':>10}{'CPU':>8}")
    ratios = {}
    for name in ways:
        ratios[name] = statistics.median(
            a / b for a, b in zip(wall["ours"], wall[name], strict=True)
        )
        by_cpu = statistics.median(a / b for a, b in zip(cpu["ours"], cpu[name], strict=True))
        w, c = statistics.median(wall[name]), statistics.median(cpu[name])
        print(
            f"{name:8}{w:>8.1f} s{w / n * 1e3:>9.0f} ms{c:>8.1f} s{c / n * 1e3:>9.0f} ms"
            f"{ratios[name]:>10.2f}{by_cpu:>8.2f}"
        )
    own = statistics.median(loops) / n * 1e3
    print(f"controller's own CPU: {own:.1f} ms a trial; {statistics.median(rests):.1f} s before")
    return verdict(
        (ratios["basic"] <= 1, f"no slower than basic: {ratios['basic']:.2f}"),
        (ratios["joblib"] <= 0.7, f"at most 0.7 x joblib: {ratios['joblib']:.2f}"),
        (own <= 20, f"controller at most 20 ms a trial: {own:.1f}"),
    )
