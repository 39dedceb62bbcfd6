"""A fit stage of an experiment, built as a run does, to be measured on its own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import execution_whitelist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from stagesweep.base.seeding import seed_everything
from stagesweep.base.view import View
from stagesweep.config import register, schema, trust
from stagesweep.core.fit import Loop
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.run.build import build, build_stage
from stagesweep.tracking.metric_log import MetricLog
from stagesweep.tracking.tensorboard import TensorBoardWriter


@cache
def composed(*overrides: str) -> DictConfig:
    """The config of a run, as the command composes it."""
    register.register()
    with initialize_config_dir(str(register.folder())):
        return compose("config", list(overrides))


def fits(cfg: DictConfig) -> list[str]:
    """The names of the stages that train."""
    kinds = {str(name): OmegaConf.get_type(node) for name, node in cfg.stage.items()}
    return [
        name for name, kind in kinds.items() if kind is not None and issubclass(kind, schema.Fit)
    ]


@lru_cache(maxsize=1)
def built_data(node: str) -> Any:
    """The data set of a config node in YAML; built once for neighbouring stages that share it."""
    return build("data", OmegaConf.create(node))


class FitStage:
    """The data, model, loss terms and settings of one fit stage, without the stages before it."""

    def __init__(self, cfg: DictConfig, stage: str, profile: HardwareProfile) -> None:
        self.stage, self.profile = stage, profile
        seed_everything(0)
        with execution_whitelist(trust.trusted()):
            self.data: Any = built_data(OmegaConf.to_yaml(cfg.data, resolve=True))
            self.settings: schema.Fit = build_stage(stage, cfg.stage[stage])
            part = self.settings.part
            node = cfg.model if part is None else cfg.model[part]
            model: Any = build("model", node, spec=self.data.spec)
            terms = {t: build(f"loss.{t}", cfg.loss[t]) for t in self.settings.loss}
        if hasattr(model, "checkpointed"):
            model.checkpointed = profile.activation_checkpointing
        self.model: nn.Module = model.to(profile.device)
        self.terms = {name: term.to(profile.device) for name, term in terms.items()}

    def view(self, split: str) -> View:
        """A split, ready for the device of the profile."""
        found: View = self.data.split(split)
        return found.prepare(self.profile.device, self.profile.workers, self.profile.pin_memory)

    @contextmanager
    def loop(self, train: View | None = None) -> Iterator[Loop]:
        """The fit, in a temporary folder; on other training data if `train` is given."""
        with tempfile.TemporaryDirectory() as folder:
            writer = TensorBoardWriter(Path(folder))
            rows = MetricLog(Path(folder, "metrics.jsonl"), writer, self.stage)
            yield Loop(
                model=self.model,
                terms=self.terms,
                settings=self.settings,
                views={"train": train or self.view("train"), "val": self.view("val")},
                spec=self.data.spec,
                hardware=self.profile,
                seed=0,
                folder=Path(folder, "checkpoints"),
                rows=rows,
            )
            rows.close()
            writer.close()


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {torch.get_num_threads()} thread(s)"
