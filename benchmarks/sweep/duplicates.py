"""Proposals that repeat an earlier one, on 8 slots: `search=bayes`, and TPE as the plugin has it.

The space is small and discrete (5 x 5 x 5 points). There a model of the objective soon proposes the
same best point again, for every free slot at once.
"""

from collections.abc import Sequence

import yaml

from benchmarks.sweep.lab import STOCK, Lab, describe_machine, lab, options, verdict

SPACE = (
    "search=bayes",
    "search/space=none",
    "stage.toy.x=choice(0,1,2,3,4)",
    "stage.toy.y=choice(0,1,2,3,4)",
    "stage.toy.z=choice(0,1,2,3,4)",
)
# The plugin's defaults; trials run one after another, but are proposed together.
STOCK_TPE = (
    *STOCK,
    "hydra/launcher=basic",
    "hydra.sweeper.sampler.multivariate=false",
    "hydra.sweeper.sampler.group=false",
    "hydra.sweeper.sampler.constant_liar=false",
    "hydra.sweeper.sampler.n_startup_trials=10",
)


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    given = options(__doc__, argv, trials=(64, 10), slots=(8, 8), seeds=(1, 1))
    n, slots = given.trials, given.slots
    ways = {
        "ours": (f"search.n_trials={n}", f"sweep.slots={slots}"),
        "stock TPE": (*STOCK_TPE, f"hydra.sweeper.n_trials={n}", f"hydra.sweeper.n_jobs={slots}"),
    }
    print(describe_machine())
    print(f"{n} proposals from 125 points, {slots} at once")
    print(f"{'':12}{'seed':>6}{'repeated':>10}{'run again':>11}{'best':>8}{'wall':>10}")
    worst = {"proposed": 0, "run": 0}
    for seed in range(given.seeds):
        for name, overrides in ways.items():
            with lab() as here:
                spent = here.sweep(*SPACE, *overrides, f"search.seed={seed}")
                points = proposed(here)
                again = len(here.calls) - len(set(points)) if name == "ours" else None
                repeated = len(points) - len(set(points))
                ran = repeated if again is None else again
            print(
                f"{name:12}{seed:>6}{repeated:>10}{ran:>11}"
                f"{max(map(score, points)):>8.2f}{spent.wall:>8.1f} s",
                flush=True,
            )
            if name == "ours":
                worst = {
                    "proposed": max(worst["proposed"], repeated),
                    "run": max(worst["run"], ran),
                }
    return verdict(
        (worst["proposed"] <= 2, f"at most 2 repeated: {worst['proposed']}"),
        (worst["run"] == 0, f"none run again: {worst['run']}"),
    )


def proposed(here: Lab) -> list[tuple[int, int, int]]:
    """The points of the trials, in order."""
    if (here.folder / "sweep" / "study.db").exists():
        names = ("stage.toy.x", "stage.toy.y", "stage.toy.z")
        trials = here.study.trials
        return [(t.params[names[0]], t.params[names[1]], t.params[names[2]]) for t in trials]
    files = sorted((here.folder / "sweep").glob("*/.hydra/overrides.yaml"))
    given = (dict(line.split("=") for line in yaml.safe_load(f.read_text())) for f in files)
    chosen = ([int(each[f"stage.toy.{key}"]) for key in "xyz"] for each in given)
    return [(x, y, z) for x, y, z in chosen]


def score(point: tuple[int, int, int]) -> float:
    """The score of the toy stage."""
    x, y, z = point
    return x + y / 10 + z / 100
