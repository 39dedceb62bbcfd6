"""A sweep of the joint stage, with reuse (pretraining runs once) and without (once for each trial).

The stages before the joint one take P seconds, the others F. K trials one after another take
P + K F with reuse and K (P + F) without. Both sweeps run on one slot, so only reuse differs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweep.lab import describe_machine, lab, options, verdict

# The stages before the swept one. No figures, because UMAP would take most of the time.
SHARED = ("pretrain", "choose_clusters", "init_clusters", "baselines")


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    given = options(__doc__, argv, trials=(8, 2), epochs=(80, 2), joint=(15, 1))
    k = given.trials
    rates = ",".join(f"{5e-4 * 1.25**n:.3g}" for n in range(k))
    overrides = (
        "experiment=digits",
        f"stage.joint.optimizer.lr={rates}",
        f"stage.pretrain.epochs={given.epochs}",
        f"stage.joint.epochs={given.joint}",
        "~stage.figures",
        "sweep.slots=1",
        *(("~stage.baselines", "~stage.choose_clusters") if given.small else ()),
    )
    print(describe_machine())
    print(f"{k} trials of digits, {given.epochs} + {given.joint} epochs, one slot")
    with lab() as here:
        once = here.sweep(*overrides)
        trials = [stages(here.folder / "sweep" / str(n)) for n in range(k)]
    with lab() as here:
        each = here.sweep(*overrides, "resume=never")
        alone = [stages(here.folder / "sweep" / str(n)) for n in range(k)]
    before = sum(s["seconds"] for trial in alone for s in trial if s["name"] in SHARED) / k
    after = sum(s["seconds"] for trial in alone for s in trial if s["name"] not in SHARED) / k
    predicted = k * (before + after) / (before + k * after)
    ran = sum(s["status"] == "ran" for trial in trials for s in trial if s["name"] == "pretrain")
    never = sum(s["status"] == "ran" for trial in alone for s in trial if s["name"] == "pretrain")
    print(f"{'':16}{'wall':>10}{'CPU':>10}{'pretrained':>12}")
    print(f"{'resume=never':16}{each.wall:>8.1f} s{each.cpu:>8.1f} s{never:>12}")
    print(f"{'reused':16}{once.wall:>8.1f} s{once.cpu:>8.1f} s{ran:>12}")
    print(f"{'ratio':16}{each.wall / once.wall:>10.2f}{each.cpu / once.cpu:>10.2f}")
    print(f"predicted {predicted:.2f}: P {before:.1f} s, F {after:.1f} s")
    return verdict((ran == 1, f"pretraining ran once: {ran}"))


def stages(folder: Path) -> list[dict[str, Any]]:
    """The stages of a run, by its result."""
    found: list[dict[str, Any]] = json.loads((folder / "result.json").read_text())["stages"]
    return found
