"""Successive halving (ASHA) on digits: the loss in quality, and the share of epochs that it trains.

For each of several seeds of the sampler, the same random points of pretraining (learning rate, the
weights of two terms) twice: every trial to its end, and with `search/pruner=asha`, which looks at
the validation loss of the reconstruction after each epoch. The objective is the same number at the
end. Epochs are counted in the rows that the trials left.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sweep.lab import describe_machine, lab, options, verdict

METRIC = "pretrain/val_reconstruction"
SPACE = (
    "experiment=digits",
    "search=random",
    "search/space=none",
    "stage.pretrain.optimizer.lr=tag(log, interval(1e-4, 1e-2))",
    "stage.pretrain.loss.kl.weight=tag(log, interval(0.05, 2.0))",
    "stage.pretrain.loss.contrastive.weight=tag(log, interval(3.0, 60.0))",
    f"objective.metric={METRIC}",
    "objective.mode=min",
    # Only the fit: the stages after it cost the same for every remaining trial.
    *(f"~stage.{name}" for name in ("choose_clusters", "init_clusters", "baselines", "joint")),
    *(f"~stage.{name}" for name in ("evaluate", "figures")),
)
ASHA = ("search/pruner=asha", "search.pruner.reduction_factor=3")


def main(argv: Sequence[str]) -> int:
    """Print the table."""
    given = options(__doc__, argv, seeds=(5, 1), trials=(24, 4), epochs=(30, 4), least=(4, 1))
    shared = (
        *SPACE,
        f"stage.pretrain.epochs={given.epochs}",
        # While a weight rises, early numbers say little about the last ones.
        "stage.pretrain.loss.kl.ramp=0",
        f"search.n_trials={given.trials}",
        "sweep.slots=2",
    )
    asha = (*ASHA, f"search.pruner.min_resource={given.least}")
    print(describe_machine())
    print(f"{given.trials} trials of {given.epochs} epochs, objective {METRIC}")
    print(
        f"{'seed':>4}{'best':>10}{'by asha':>10}{'worse by':>10}{'epochs':>9}"
        f"{'by asha':>9}{'share':>8}"
    )
    worst, total = 0.0, [0, 0]
    for seed in range(given.seeds):
        best, epochs = [], []
        for pruner in ((), asha):
            with lab() as here:
                here.sweep(*shared, *pruner, f"search.seed={seed}")
                best.append(here.study.best_value)
                epochs.append(trained(here.folder / "sweep"))
        worse = best[1] / best[0] - 1
        worst, total = max(worst, worse), [a + b for a, b in zip(total, epochs, strict=True)]
        print(
            f"{seed:>4}{best[0]:>10.4f}{best[1]:>10.4f}{worse:>10.2%}{epochs[0]:>9}{epochs[1]:>9}"
            f"{epochs[1] / epochs[0]:>8.1%}",
            flush=True,
        )
    share = total[1] / total[0]
    return verdict(
        (worst <= 0.01, f"within 1 % of the best for every seed: {worst:.2%}"),
        (share <= 0.4, f"at most 40 % of the epochs: {share:.1%}"),
    )


def trained(sweep: Path) -> int:
    """Number of epochs that the trials of a sweep trained."""
    rows = (
        json.loads(line)
        for file in sweep.glob("*/stages/*/metrics.jsonl")
        for line in file.read_text().splitlines()
    )
    return sum(row["kind"] == "epoch" for row in rows)
