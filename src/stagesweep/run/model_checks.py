"""Checks stages against data and model, before the first one trains."""

from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf
from torch import nn

from stagesweep.base.errors import UserError
from stagesweep.base.seeding import rng_state, set_rng_state
from stagesweep.config import nodes, schema
from stagesweep.config.signatures import locate
from stagesweep.config.stage_checks import fits_of
from stagesweep.core import optim
from stagesweep.run.build import build, build_stage, fitting_weights
from stagesweep.store.stage_inputs import initial_weights

if TYPE_CHECKING:
    from stagesweep.run.context import Context


def check_stages(run: "Context") -> None:
    """Check the parameters that fits name (train, freeze, groups) and `init_from`; UserError.

    Calls ``check_spec(name, spec)`` of each stage that has this method.

    Leaves out fits on data that an earlier stage makes, which size the model, and models that
    cannot be built on the meta device.
    """
    models: dict[str | None, nn.Module | None] = {}
    weights = initial_weights(run.cfg)
    for name, node in run.cfg.stage.items():
        stage = OmegaConf.to_object(node)
        part = getattr(stage, "part", None)
        if getattr(stage, "view", None) is not None:
            continue
        if hasattr(locate(f"stage.{name}", node._target_), "check_spec"):
            build_stage(str(name), node).check_spec(str(name), run.data.spec)
        for path, settings in fits_of(f"stage.{name}", stage):
            own = part or settings.part
            if settings.view is not None or (own is None and nodes.has_parts(run.cfg.model)):
                continue
            if own not in models:
                models[own] = model = _on_meta(run, own)
                if model is not None and weights is not None:
                    fitting_weights(model, weights, own)
            if (model := models[own]) is not None:
                check_fit(path, model, settings)


def _on_meta(run: "Context", part: str | None) -> nn.Module | None:
    """A part of the model (None: all) without memory; None if it cannot be built so."""
    path, node = ("model", run.cfg.model)
    if part is not None:
        path, node = f"model.{part}", run.cfg.model[part]
    spec = run.data.spec
    state = rng_state()
    try:
        with torch.device("meta"):
            made: nn.Module = build(path, node, spec=spec)
    except Exception:
        return None  # building it in its stage has the better message
    finally:
        set_rng_state(state)
    return made


def check_fit(path: str, model: nn.Module, settings: schema.Fit) -> None:
    """Check the names of parameters in the settings of a fit; UserError with the key."""
    try:
        optim.freeze(model, settings.train, settings.freeze)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        optim.matching(trained, settings.optimizer.groups, "optimizer.groups")
    except UserError as error:
        separator = ": " if str(error).startswith("no parameter") else "."
        raise UserError(f"{path}{separator}{error}") from error
