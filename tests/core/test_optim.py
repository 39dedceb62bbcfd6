from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.core.optim import (
    build_optimizer,
    freeze,
    frozen_modules,
    learning_rate,
    matching,
    train_mode,
)

Make = Callable[..., nn.Module]


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    """Names of the parameters of each group of an optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}


class TestFreeze:
    def test_everything_is_trained_by_default(self, tiny: Make) -> None:
        model = tiny()
        freeze(model, ["*"], [])
        assert trained(model) == set(dict(model.named_parameters()))

    def test_globs_select_trained_and_frozen_parameters(self, tiny: Make) -> None:
        model = tiny()
        freeze(model, ["encoder.*", "decoder.*"], ["*.bias"])
        assert trained(model) == {"encoder.0.weight", "decoder.weight"}

    def test_parameters_frozen_by_an_earlier_fit_are_trained(self, tiny: Make) -> None:
        model = tiny()
        freeze(model, ["*"], ["encoder.*"])
        freeze(model, ["*"], [])
        assert "encoder.0.weight" in trained(model)

    @pytest.mark.parametrize(
        ("train", "frozen", "key"),
        [(["enc*", "haed.*"], [], "train"), (["*"], ["haed.*"], "freeze")],
    )
    def test_a_glob_that_matches_nothing(
        self, tiny: Make, train: list[str], frozen: list[str], key: str
    ) -> None:
        with pytest.raises(UserError) as caught:
            freeze(tiny(), train, frozen)
        assert str(caught.value) == (
            f"{key}: 'haed.*' matches no parameter; the model's parts are decoder, encoder, latent"
        )

    def test_no_parameter_left_to_train(self, tiny: Make) -> None:
        with pytest.raises(UserError, match=r"^no parameter is left to train: 'freeze' matches"):
            freeze(tiny(), ["encoder.*"], ["*"])

    def test_globs_match_case(self) -> None:
        assert matching(["Head.weight", "head.weight"], ["head.*"], "train") == {"head.weight"}


class TestTrainMode:
    def test_norms_of_frozen_modules_keep_their_statistics(self, tiny: Make) -> None:
        model = tiny(dropout=0.5, norm=True)
        freeze(model, ["*"], ["norm.*", "encoder.*"])
        train_mode(model, frozen_modules(model))
        norm, encoder = model.get_submodule("norm"), model.get_submodule("encoder")
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        model({"x": torch.randn(20, 6) + 5})
        for key, value in norm.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert not any(module.training for module in (norm, *encoder.modules()))
        assert model.training
        assert model.get_submodule("latent").training

    def test_norms_that_are_trained_follow_the_data(self, tiny: Make) -> None:
        model = tiny(norm=True)
        freeze(model, ["*"], ["encoder.*"])
        train_mode(model, frozen_modules(model))
        model({"x": torch.randn(20, 6) + 5})
        assert model.get_buffer("norm.num_batches_tracked") == 1

    def test_a_partly_trained_module_is_in_training_mode(self, tiny: Make) -> None:
        model = tiny(norm=True)
        freeze(model, ["*"], ["norm.bias"])
        train_mode(model, frozen_modules(model))
        assert model.get_submodule("norm").training


class TestOptimizer:
    def test_frozen_parameters_are_left_out(self, tiny: Make) -> None:
        model = tiny()
        freeze(model, ["*"], ["encoder.*"])
        optimizer = build_optimizer(model, schema.Optimizer())
        assert groups(model, optimizer) == {"default": trained(model)}

    def test_the_last_matching_glob_decides_the_group(self, tiny: Make) -> None:
        model = tiny()
        settings = schema.Optimizer(
            lr=1e-3,
            weight_decay=0.1,
            groups={
                "encoder.*": schema.Group(lr=1e-4),
                "*.bias": schema.Group(weight_decay=0.0),
            },
        )
        optimizer = build_optimizer(model, settings)
        assert groups(model, optimizer) == {
            "default": {"latent.weight", "decoder.weight"},
            "encoder.*": {"encoder.0.weight"},
            "*.bias": {"encoder.0.bias", "latent.bias", "decoder.bias"},
        }
        found = {
            g["name"]: (g["lr"], g["base_lr"], g["weight_decay"]) for g in optimizer.param_groups
        }
        assert found == {
            "default": (1e-3, 1e-3, 0.1),
            "encoder.*": (1e-4, 1e-4, 0.1),
            "*.bias": (1e-3, 1e-3, 0.0),
        }

    def test_groups_train_at_their_rates(self, tiny: Make) -> None:
        model = tiny()
        settings = schema.Optimizer(
            _target_="torch.optim.SGD",
            lr=1.0,
            weight_decay=0.0,
            groups={"decoder.*": schema.Group(lr=0.25)},
        )
        optimizer = build_optimizer(model, settings)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for name, parameter in model.named_parameters():
            rate = 0.25 if name.startswith("decoder") else 1.0
            torch.testing.assert_close(parameter.detach(), before[name] - rate)

    def test_an_unknown_group(self, tiny: Make) -> None:
        settings = schema.Optimizer(groups={"haed.*": schema.Group(lr=1e-4)})
        with pytest.raises(UserError, match=r"^optimizer.groups: 'haed.\*' matches no parameter"):
            build_optimizer(tiny(), settings)

    def test_a_group_of_frozen_parameters_only(self, tiny: Make) -> None:
        model = tiny()
        freeze(model, ["*"], ["encoder.*"])
        settings = schema.Optimizer(groups={"encoder.*": schema.Group(lr=1e-4)})
        with pytest.raises(UserError, match=r"the model's parts are decoder, latent$"):
            build_optimizer(model, settings)

    @pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "NAdam", "Adagrad"])
    def test_any_torch_optimizer_gets_its_own_settings(self, tiny: Make, name: str) -> None:
        settings = schema.Optimizer(_target_=f"torch.optim.{name}", betas=(0.8, 0.9))
        optimizer = build_optimizer(tiny(), settings)
        defaults = optimizer.defaults
        assert defaults.get("betas", (0.8, 0.9)) == (0.8, 0.9)
        assert defaults.get("fused", True) in (True, None)
        assert (defaults.get("fused") is True) == (name in ("AdamW", "Adam", "SGD", "Adagrad"))


def by_torch(schedule: Any, base: float, steps: int) -> list[float]:
    """The rates a torch scheduler gives over `steps` steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


class TestLearningRate:
    EPOCHS, STEPS = 10, 7

    def ours(self, settings: schema.Schedule, base: float = 0.3) -> list[float]:
        positions = (step / self.STEPS for step in range(self.EPOCHS * self.STEPS))
        return [learning_rate(base, position, self.EPOCHS, settings) for position in positions]

    def test_cosine_is_that_of_torch(self) -> None:
        total = self.EPOCHS * self.STEPS
        expected = by_torch(
            lambda o: lr_scheduler.CosineAnnealingLR(o, total, eta_min=0.01), 0.3, total
        )
        assert self.ours(schema.Schedule(min_lr=0.01)) == pytest.approx(expected, abs=1e-12)

    def test_warmup_is_that_of_torch(self) -> None:
        warm, total = 2 * self.STEPS, self.EPOCHS * self.STEPS
        expected = by_torch(
            lambda o: lr_scheduler.LinearLR(o, start_factor=1e-12, total_iters=warm), 0.3, total
        )
        schedule = schema.Schedule(decay=schema.Decay.constant, warmup=2)
        assert self.ours(schedule) == pytest.approx(expected, abs=1e-9)

    def test_warmup_then_cosine_is_that_of_torch(self) -> None:
        warm, total = 2 * self.STEPS, self.EPOCHS * self.STEPS
        expected = by_torch(
            lambda o: lr_scheduler.SequentialLR(
                o,
                [
                    lr_scheduler.LinearLR(o, start_factor=1e-12, total_iters=warm),
                    lr_scheduler.CosineAnnealingLR(o, total - warm, eta_min=0.01),
                ],
                [warm],
            ),
            0.3,
            total,
        )
        schedule = schema.Schedule(warmup=2, min_lr=0.01)
        assert self.ours(schedule) == pytest.approx(expected, abs=1e-9)

    def test_plateau_is_constant_until_it_is_reduced(self) -> None:
        assert set(self.ours(schema.Schedule(decay=schema.Decay.plateau))) == {0.3}

    rates = st.floats(1e-6, 10)
    epochs = st.integers(1, 500)

    @given(
        rates,
        st.floats(0, 1),
        epochs,
        st.floats(0, 100),
        st.floats(0, 1),
        st.sampled_from(schema.Decay),
    )
    def test_the_rate_stays_between_zero_and_the_base(
        self, base: float, at: float, epochs: int, warmup: float, floor: float, decay: schema.Decay
    ) -> None:
        settings = schema.Schedule(decay=decay, warmup=warmup, min_lr=floor)
        assert 0 <= learning_rate(base, at * epochs, epochs, settings) <= base * (1 + 1e-9)

    @given(rates, epochs, st.floats(0, 0.9), st.floats(0, 1))
    def test_cosine_ends_at_the_least_rate(
        self, base: float, epochs: int, warmup: float, floor: float
    ) -> None:
        settings = schema.Schedule(warmup=warmup * epochs, min_lr=floor)
        end = learning_rate(base, epochs, epochs, settings)
        assert end == pytest.approx(min(floor, base), rel=1e-9, abs=1e-12)

    @given(rates, epochs, st.floats(0, 0.9), st.lists(st.floats(0, 1), min_size=2, max_size=2))
    def test_the_rate_rises_and_then_falls(
        self, base: float, epochs: int, warmup: float, at: list[float]
    ) -> None:
        settings = schema.Schedule(warmup=warmup * epochs, min_lr=0)
        low, high = sorted(at)
        rising = [learning_rate(base, x * warmup * epochs, epochs, settings) for x in (low, high)]
        falling = [
            learning_rate(base, (warmup + x * (1 - warmup)) * epochs, epochs, settings)
            for x in (low, high)
        ]
        assert rising[0] <= rising[1] * (1 + 1e-9)
        assert falling[0] >= falling[1] * (1 - 1e-9) - 1e-12
