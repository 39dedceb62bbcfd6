"""Trials of mixed length on two slots: the share of the time in which the slots work.

The lengths are heavy-tailed, the longest 20 times the shortest. Beside it the same trials by the
stock sweeper on joblib, in batches of two: each batch waits for its longer trial.
"""

import random
from collections.abc import Sequence

from benchmarks.sweep.lab import STOCK, describe_machine, lab, options, verdict


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    given = options(__doc__, argv, trials=(24, 6), seed=(0, 0), milliseconds=(3000, 300))
    lengths = mixed(given.trials, given.milliseconds / 1000, given.seed)
    space = f"stage.toy.seconds={','.join(map(str, lengths))}"
    stock = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2")
    ways = {
        "ours": ("search=grid", space, "sweep.slots=2"),
        # It visits its grid in random order: the same lengths, but in other batches.
        "joblib": ("search=grid", space, *STOCK, *stock, f"hydra.sweeper.n_trials={given.trials}"),
    }
    print(describe_machine())
    print(
        f"{given.trials} trials of {min(lengths)} to {max(lengths)} s, {sum(lengths):.0f} s in all"
    )
    print(f"{'':8}{'busy until the last start':>28}{'first to last':>16}{'least':>10}{'wall':>10}")
    shares = {}
    for name, overrides in ways.items():
        with lab() as here:
            spent = here.sweep(*overrides)
            calls = [(began, ended) for began, ended, _ in here.calls]
        shares[name] = busy(calls, slots=2)
        span = max(end for _, end in calls) - min(began for began, _ in calls)
        print(
            f"{name:8}{shares[name]:>28.1%}{span:>14.1f} s{sum(lengths) / 2:>8.1f} s"
            f"{spent.wall:>8.1f} s",
            flush=True,
        )
    return verdict((shares["ours"] >= 0.95, f"busy at least 95 %: {shares['ours']:.1%}"))


def mixed(count: int, shortest: float, seed: int) -> list[float]:
    """Lengths from a Pareto distribution (shape 0.8) cut at 20 times the shortest, in seconds."""
    chance = random.Random(seed)
    rest = [min(20.0, chance.paretovariate(0.8)) for _ in range(count - 2)]
    factors = [1.0, *rest, 20.0]
    chance.shuffle(factors)
    # Equal lengths would be the same point of the grid.
    return [round(shortest * factor + n / 1000, 3) for n, factor in enumerate(factors)]


def busy(calls: Sequence[tuple[float, float]], slots: int) -> float:
    """Share of the slots' time, from the first begin to the last, in which a trial runs.

    A trial counts from the begin to the end of its stage; its start-up and its end are lost time.
    """
    first, last = min(began for began, _ in calls), max(began for began, _ in calls)
    worked = sum(min(ended, last) - began for began, ended in calls)
    return worked / (slots * (last - first))
