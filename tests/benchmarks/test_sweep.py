"""Helpers of the sweep benchmarks; `make bench-sweep` runs the benchmarks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from hydra_plugins.hydra_optuna_sweeper.config import TPESamplerConfig
from omegaconf import DictConfig
from optuna.samplers import TPESampler

Compose = Callable[..., DictConfig]
ROOT = Path(__file__).parents[2]


def test_slots_are_busy_from_the_first_begin_to_the_last() -> None:
    from benchmarks.sweep.busy import busy

    assert busy([(0, 4), (0, 2), (2, 9), (4, 5)], slots=2) == 1
    # One slot waits from 1 to 3; time after the last begin does not count.
    assert busy([(0, 3), (0, 1), (3, 20), (3, 4)], slots=2) == pytest.approx(4 / 6)


def test_lengths_are_mixed_from_1_to_20_and_all_different() -> None:
    from benchmarks.sweep.busy import mixed

    lengths = mixed(24, shortest=1.0, seed=0)
    assert len(set(lengths)) == 24
    assert min(lengths) == pytest.approx(1, abs=0.03)
    assert max(lengths) == pytest.approx(20, abs=0.03)


def test_the_toy_experiment_is_digits_with_another_stage(tmp_path: Path) -> None:
    from benchmarks.sweep.lab import experiment

    toy: dict[str, Any] = yaml.safe_load(experiment(tmp_path))
    digits = yaml.safe_load((ROOT / "conf" / "experiment" / "digits.yaml").read_text())
    assert toy["loss"] == digits["loss"]
    assert list(toy["stage"]) == ["toy"]
    assert {"override /model": "vae_digits"} in toy["defaults"]
    assert not [each for each in toy["defaults"] if "stage@" in str(each)]


def test_the_stock_sampler_has_its_own_defaults(compose: Compose) -> None:
    from benchmarks.sweep.duplicates import SPACE, STOCK_TPE

    space = (each for each in SPACE if "toy" not in each)
    compose("experiment=digits", *space, *STOCK_TPE)
    sampler = HydraConfig.get().sweeper.sampler
    chosen = ("multivariate", "group", "constant_liar", "n_startup_trials")
    stock = vars(TPESamplerConfig())
    assert {name: sampler[name] for name in chosen} == {name: stock[name] for name in chosen}
    made = instantiate(
        sampler, _execution_whitelist_=("hydra_plugins.hydra_optuna_sweeper.*", "optuna.*")
    )
    assert isinstance(made, TPESampler)
