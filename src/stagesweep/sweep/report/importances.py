"""The importance of each parameter for an objective, computed by Optuna."""

import optuna

from stagesweep.sweep.report.loading import Sweep, drawable

# Above this number of trials a faster method is used.
MANY = 300


def method(sweep: Sweep) -> str:
    """The name of the evaluator: fANOVA takes minutes with many trials."""
    return "fANOVA" if len(sweep.complete) <= MANY else "mean decrease of impurity"


def importances(sweep: Sweep, objective: int) -> dict[str, float] | str:
    """The share of the variance that each parameter explains, or why it cannot be computed."""
    if len({trial.values[objective] for trial in drawable(sweep, objective)}) < 2:
        return f"{sweep.objectives[objective]} is the same in all trials."
    kind = {
        "fANOVA": optuna.importance.FanovaImportanceEvaluator,
        "mean decrease of impurity": optuna.importance.MeanDecreaseImpurityImportanceEvaluator,
    }[method(sweep)]
    try:
        found = optuna.importance.get_param_importances(
            sweep.study, evaluator=kind(seed=0), target=lambda trial: trial.values[objective]
        )
    except (ValueError, RuntimeError) as error:
        return f"Cannot be computed: {error}"
    if not found:
        return "No parameter that varies is common to all trials."
    return {name: float(share) for name, share in found.items()}
