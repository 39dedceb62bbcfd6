"""Parameters to train, optimizer and learning-rate schedule."""

import inspect
import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stagesweep.base.errors import UserError
from stagesweep.config import schema


def matching(names: Iterable[str], globs: Iterable[str], key: str) -> set[str]:
    """The names that match any of `globs`; UserError for a glob that matches none.

    A glob that matches a part of the model matches everything below it.
    """
    names = list(names)
    matched: set[str] = set()
    for glob in globs:
        hits = {name for name in names if any(fnmatchcase(name, g) for g in (glob, f"{glob}.*"))}
        if not hits:
            parts = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise UserError(f"{key}: '{glob}' matches no parameter; the model's parts are {parts}")
        matched |= hits
    return matched


def freeze(model: nn.Module, train: list[str], frozen: list[str]) -> None:
    """Train only the parameters that match `train` and do not match `frozen`."""
    names = dict(model.named_parameters())
    chosen = matching(names, train, "train") - matching(names, frozen, "freeze")
    if not chosen:
        raise UserError("no parameter is left to train: 'freeze' matches all that 'train' does")
    for name, parameter in names.items():
        parameter.requires_grad_(name in chosen)


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are all frozen."""
    return [
        module
        for module in model.modules()
        if (parameters := list(module.parameters()))
        and not any(parameter.requires_grad for parameter in parameters)
    ]


def train_mode(model: nn.Module, frozen: list[nn.Module]) -> None:
    """Set training mode, but eval mode for frozen modules: their norms keep their statistics."""
    model.train()
    for module in frozen:
        module.eval()


def parameters_and_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters and their gradients, by name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()
            if parameter.grad is not None:
                yield f"{name}.grad", parameter.grad


def build_optimizer(model: nn.Module, settings: schema.Optimizer) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters.

    The last glob of ``settings.groups`` that matches a parameter decides its group; the base
    learning rate of each group is kept as ``base_lr``. Frozen parameters are left out.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    group_of = dict.fromkeys(trained, "default")
    for glob in settings.groups:
        group_of |= dict.fromkeys(matching(trained, [glob], "optimizer.groups"), glob)
    groups: list[dict[str, Any]] = []
    for name in ["default", *settings.groups]:
        own = settings.groups.get(name, schema.Group())
        lr = settings.lr if own.lr is None else own.lr
        decay = settings.weight_decay if own.weight_decay is None else own.weight_decay
        members = [p for key, p in trained.items() if group_of[key] == name]
        if members:
            groups.append(
                {"params": members, "lr": lr, "weight_decay": decay, "base_lr": lr, "name": name}
            )
    cls = get_class(settings._target_)
    accepted = inspect.signature(cls).parameters
    extra = {"betas": settings.betas, "fused": True}
    optimizer: torch.optim.Optimizer = cls(
        groups, lr=settings.lr, **{k: v for k, v in extra.items() if k in accepted}
    )
    return optimizer


def running_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """An exponential moving average of the weights, buffers included; None without a decay."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def learning_rate(base: float, position: float, epochs: float, settings: schema.Schedule) -> float:
    """Learning rate `position` epochs into a fit of `epochs`.

    Linear warmup, then constant or a cosine to ``min_lr`` (Loshchilov & Hutter 2017, eq. 5, one
    cycle); plateau is constant here, its reductions are a factor of `MetricTracker`.
    """
    if position < settings.warmup:
        return base * position / settings.warmup
    if settings.decay is not schema.Decay.cosine:
        return base
    done = min(1.0, (position - settings.warmup) / max(epochs - settings.warmup, 1e-12))
    floor = min(settings.min_lr, base)
    return floor + (base - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
