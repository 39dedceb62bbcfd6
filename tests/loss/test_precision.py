"""Every loss term of conf/loss computes in fp32, also for bf16 outputs and under autocast."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hydra.utils import execution_whitelist, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from stagesweep.base.seeding import seed_everything
from stagesweep.base.terms import whole_batch_outputs
from stagesweep.config import register, trust

Compose = Callable[..., DictConfig]

LOSSES = sorted(file.stem for file in (register.folder() / "loss").glob("*.yaml"))
EXPERIMENTS = sorted(file.stem for file in (register.folder() / "experiment").glob("*.yaml"))
# Experiments for losses that are otherwise used only with a file.
OTHERWISE = "audiogram_simulated"


@pytest.fixture(scope="module")
def experiments(compose: Compose) -> dict[str, DictConfig]:
    """Experiments that need no file, made small."""
    found = {name: compose(f"experiment={name}") for name in EXPERIMENTS}
    OmegaConf.update(found[OTHERWISE], "data.animals", 300)
    OmegaConf.update(found[OTHERWISE], "data.genes", 60)
    return {name: cfg for name, cfg in found.items() if not OmegaConf.missing_keys(cfg)}


def used(experiments: dict[str, DictConfig], loss: str) -> tuple[DictConfig, Any]:
    """An experiment that uses a loss on its own data, and its config of the loss."""
    node = OmegaConf.load(register.folder() / "loss" / f"{loss}.yaml")
    for cfg in experiments.values():
        for name, own in cfg.loss.items():
            by = [s for s in cfg.stage.values() if "loss" in s and name in s.loss]
            if own._target_ == node._target_ and all(stage.view is None for stage in by):
                return cfg, own
    otherwise = {"feature": "thresholds", "label": "gene", "name": "states", "group": "patient"}
    for key in OmegaConf.missing_keys(node):
        node[key] = otherwise[key]
    return experiments[OTHERWISE], node


def drawn() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random batch columns and outputs for losses whose data a stage derives."""
    random = torch.Generator().manual_seed(0)
    values = [torch.rand(64, 5, generator=random) for _ in range(6)]
    names = ("predicted", "logvar", "target")
    outputs = {f"states/{name}": value for name, value in zip(names, values[:3], strict=True)}
    outputs |= {"states/observed": (values[3] > 0.2).float()}
    outputs |= {"log_proportions": values[4].log_softmax(1)}
    outputs |= {"projection": torch.nn.functional.normalize(values[5])}
    columns = {"proportions": values[3].softmax(1), "soft": values[3][:, :4].softmax(1)}
    return {**columns, "patient": torch.arange(64) // 4}, outputs


@cache
def batch_and_outputs(text: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training batch of an experiment, and the outputs of its untrained model."""
    cfg = OmegaConf.create(text)
    assert isinstance(cfg, DictConfig)
    seed_everything(0)
    with execution_whitelist(trust.trusted()):
        data: Any = instantiate(cfg.data, _convert_="all")
        # Of a model of parts, the first one works on the data of the run.
        node = cfg.model if "_target_" in cfg.model else next(iter(cfg.model.values()))
        model = instantiate(node, spec=data.spec, _convert_="all")
        generator = torch.Generator().manual_seed(0)
        batch = next(iter(data.split("train").batches(64)))
        for stage in cfg.stage.values():
            if stage.get("augment") is not None and "positive/" not in "".join(batch):
                augment = instantiate(stage.augment, _convert_="all")
                batch |= augment(batch, data.spec, generator)
    if hasattr(model, "sample_noise"):
        batch |= model.sample_noise(64, generator)
    with torch.no_grad():
        return batch, model(batch)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_term_is_computed_in_fp32_under_bf16(
    experiments: dict[str, DictConfig], loss: str
) -> None:
    cfg, node = used(experiments, loss)
    parts = OmegaConf.masked_copy(cfg, ["seed", "data", "model", "stage"])
    batch, outputs = batch_and_outputs(OmegaConf.to_yaml(parts, resolve=True))
    with execution_whitelist(trust.trusted()):
        term: Any = instantiate(node, _convert_="all")
    made_batch, made = drawn()
    batch, outputs = made_batch | batch, made | outputs
    if hasattr(term, "refresh"):
        term.refresh(0, lambda: outputs)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in outputs.items()}
    high = {k: v.float() if v.is_floating_point() else v for k, v in low.items()}
    expected, weight = term(high, batch)
    assert expected.dtype is torch.float32
    assert weight > 0
    assert expected.isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        for given in (high, low):
            found, _ = term(given, batch)
            assert found.dtype is torch.float32
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # The comparison can tell: what the terms read differs in bf16.
    floats = [name for name, value in outputs.items() if value.is_floating_point()]
    assert any(not torch.equal(outputs[k], high[k]) for k in (*whole_batch_outputs(term), *floats))
