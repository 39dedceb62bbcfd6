"""The sampler of each trial, and points that no trial has tried yet."""

from collections.abc import Callable, Sequence
from typing import Any

import optuna
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import FloatDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from stagesweep.config.signatures import locate_all
from stagesweep.sweep.space.space import Space

# How often a point that was tried already is drawn again.
MAX_REDRAWS = 20


def plugin_samplers() -> set[str]:
    """The functions of Hydra's Optuna sweeper that its own sampler configs name."""
    from hydra_plugins.hydra_optuna_sweeper import config

    settings = [each for each in vars(config).values() if isinstance(each, type)]
    samplers = [each for each in settings if issubclass(each, config.SamplerConfig)]
    targets = {str(getattr(each, "_target_", "")) for each in samplers}
    return {name for name in targets if name.startswith(f"{config.__package__}.")}


class SamplerFactory:
    """Makes the sampler of each trial from ``hydra.sweeper.sampler``."""

    def __init__(self, config: DictConfig, space: Space) -> None:
        # A plain dict: with a node, Hydra would copy the config around it for each trial.
        self.config: Any = OmegaConf.to_object(config)
        target = str(config.get("_target_", ""))
        if target not in plugin_samplers():
            locate_all("hydra.sweeper.sampler", self.config)
        self.space = space
        # A QMC sampler continues its sequence in a new process without help.
        self.per_trial = not target.endswith("QMCSampler")
        # Samplers propose points of a discrete space repeatedly, and such a draw is repeated. (A
        # generation of a genetic search may repeat a point, and a Gaussian process is slow.)
        discrete = all(
            not isinstance(each, FloatDistribution) or each.step is not None
            for each in space.distributions.values()
        )
        self.redraws = discrete and target.endswith(("TPESampler", "RandomSampler"))

    def create(self, number: int) -> BaseSampler:
        """The sampler of a trial.

        Its seed depends on the trial's number only, so that an interrupted sweep continues with
        the points of an uninterrupted one.
        """
        given: dict[str, Any] = {}
        if (seed := self.config.get("seed")) is not None:
            given["seed"] = (int(seed) + 1_000_003 * number) % 2**32
        sampler: BaseSampler = instantiate(
            self.config,
            **given,
            _execution_whitelist_=("hydra_plugins.hydra_optuna_sweeper.*", "optuna.*"),
        )
        return sampler

    def draw_new(
        self,
        trials: Sequence[FrozenTrial],
        directions: Sequence[StudyDirection],
        is_known: Callable[[list[str]], bool],
    ) -> dict[str, Any] | None:
        """Draw a point whose overrides are not known; None when a few draws find none.

        Draws are trials of a copy of the study. Each one counts as running there, which leads the
        sampler away from it, and the study gets no trial for a repeated point.
        """
        sampler = self.create(len(trials))
        copy = optuna.create_study(sampler=sampler, directions=directions)
        copy.add_trials(trials)
        for _ in range(MAX_REDRAWS):
            trial = copy.ask()
            if not is_known(self.space.suggest(trial)):
                return trial.params
        return None
