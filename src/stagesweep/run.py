"""What a stage runs in: all that it may ask for, and what it leaves behind."""

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from stagesweep import config, inputs
from stagesweep.core import checkpoint
from stagesweep.core.board import Board, read_rows
from stagesweep.core.distributed import team
from stagesweep.core.fit import Loop
from stagesweep.core.log import MetricLog, Unwritten
from stagesweep.core.predict import predict
from stagesweep.core.seeding import derive, rng_state, seed_everything, set_rng_state
from stagesweep.core.trace import tracing
from stagesweep.errors import UserError
from stagesweep.files import atomic_text, atomic_write
from stagesweep.hardware.machine import resolve
from stagesweep.store import Entry
from stagesweep.sweep import trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stagesweep.walk import StageResult

log = logging.getLogger(__name__)


class Run:
    """The run as its stages see it. ``stages`` are those before the one that runs now."""

    def __init__(
        self,
        cfg: DictConfig,
        folder: Path = Path(),
        stages: "Sequence[StageResult]" = (),
        board: Board | None = None,
    ) -> None:
        self.cfg, self.folder, self.stages, self.board = cfg, folder, stages, board
        self.log = log
        # As the profile says, and as it says for the stage that runs now.
        self.profile = self.machine = resolve(inputs.hardware(cfg))
        self.device = self.machine.device
        # Name, seed and entry of the stage that runs now, and the newest weights before it.
        self.stage, self.seed = "", cfg.seed
        # How fast its fit was, and every time that memory ran out.
        self.measured: dict[str, Any] = {"speed": {}, "oom": []}
        self._entry: Entry | None = None
        self._weights: Path | None = None

    def execute(self, name: str, entry: Entry, started: float) -> tuple[str, dict[str, float]]:
        """Run a stage into its entry of the store; the manifest, written last, makes it count.

        Returns ``ran`` or ``resumed``, and the metrics.
        """
        self.begin(name, entry)
        stage = build_stage(self.cfg.stage[name])
        fresh = self.cfg.resume is config.Resume.never
        partial = not fresh and any((entry.path / "checkpoints").rglob("step_*"))
        about = {"experiment": self.cfg.experiment, "stage": name}
        entry.begin(fresh=fresh, about=about)
        seed_everything(self.seed)
        metrics = {key: float(value) for key, value in stage(self).items()}
        seconds = perf_counter() - started
        entry.commit({**about, "seconds": seconds, "metrics": metrics, **self.measured})
        return "resumed" if partial else "ran", metrics

    def begin(self, name: str, entry: Entry) -> None:
        """Turn to a stage; its model has the weights that a stage before it left."""
        self.stage, self.seed, self._entry = name, derive(self.cfg.seed, name), entry
        self.machine = self.profile.at(f"{self.cfg.experiment}/{name}")
        self.measured = {"speed": {}, "oom": []}
        paths = (folder / "weights.pt" for folder in self._folders()[1:])
        weights = next((path for path in paths if path.exists()), None)
        if weights != self._weights:
            self.__dict__.pop("model", None)  # built again, with these weights, when needed
        self._weights = weights

    # ------------------------------------------------------------- what stages use

    @cached_property
    def data(self) -> Any:
        """The data set of the run."""
        return instantiate(self.cfg.data, _convert_="all")

    def view(self, split: str) -> Any:
        """A split, ready to feed this run's device."""
        machine = self.machine
        return self.data.split(split).prepare(machine.device, machine.workers, machine.pin_memory)

    @cached_property
    def model(self) -> nn.Module:
        """The model, with the weights of the latest stage that left any, or of ``init_from``."""
        model = self.build_model()
        if self._weights is not None:
            model.load_state_dict(checkpoint.load(self._weights)["model"])
        elif (path := inputs.initial_weights(self.cfg)) is not None:
            init_from(model, path, self.log)
        return model

    def build_model(self) -> nn.Module:
        """A new model as the config says, sized by the data, the same for the same seed."""
        state = rng_state()
        seed_everything(derive(self.cfg.seed, "model"))
        model: Any = instantiate(self.cfg.model, spec=self.data.spec, _convert_="all")
        set_rng_state(state)
        if hasattr(model, "checkpointed"):
            model.checkpointed = self.machine.activation_checkpointing
        return cast(nn.Module, model.to(self.device))

    def fit(self, model: nn.Module, settings: config.Fit, name: str) -> dict[str, float]:
        """Train `model` as `settings` say; returns the numbers of the last epoch.

        Where the run has several processes, all of them take part.
        """
        assert self._entry is not None
        assert self.board is not None
        terms = {t: instantiate(self.cfg.loss[t], _convert_="all") for t in settings.loss}
        order = Order(
            cfg=self.cfg,
            model=model,
            terms={key: term.to(self.device) for key, term in terms.items()},
            settings=settings,
            seed=derive(self.seed, name),
            stage=f"{self.cfg.experiment}/{self.stage}",
            name=name,
            folder=self._entry.path / "checkpoints",
        )
        rows = MetricLog(self._entry.path / "metrics.jsonl", self.board, name)
        try:
            team().hand_out(order)
            loop = self.loop(order, rows)
            try:
                with tracing(self.machine, loop.meter, self._entry.path / "profile", name):
                    return loop.run()
            finally:
                measured = loop.measured()
                self.measured["oom"] += measured["oom"]
                if name == self.stage:
                    self.measured["speed"] = measured["speed"]
        finally:
            rows.close()

    def follow(self, order: "Order") -> None:
        """Take part in a fit that the main process has handed out."""
        self.machine = self.profile.at(order.stage)
        self.loop(order, Unwritten(order.name)).run()

    def loop(self, order: "Order", rows: MetricLog) -> Loop:
        """The fit that was ordered, as this process takes part in it."""
        return Loop(
            model=order.model,
            terms=order.terms,
            settings=order.settings,
            views={split: self.view(split) for split in ("train", "val")},
            spec=self.data.spec,
            machine=self.machine,
            seed=order.seed,
            folder=order.folder,
            rows=rows,
            trial=trial.current() if team().main else None,
            team=team(),
        )

    def predict(self, split: str, names: Collection[str]) -> dict[str, np.ndarray]:
        """Model outputs and batch columns of a whole split, in order, by name.

        An output wins over a batch column of the same name; ``input/<name>`` asks for the column.
        """
        oom = self.measured["oom"]
        found = predict(self.model, self.view(split), names, self.machine, oom=oom)
        return {name: value.numpy() for name, value in found.items()}

    def save_weights(self) -> None:
        """Leave the model's weights for the stages that follow."""
        assert self._entry is not None
        checkpoint.save(self._entry.path / "weights.pt", {"model": self.model.state_dict()})

    def save(self, filename: str, value: Any) -> None:
        """Leave an artifact: .npz (dict of arrays), .json (plain data), .csv (DataFrame)."""
        path = self._write_to("artifacts", filename)
        match path.suffix:
            case ".npz":
                atomic_write(path, lambda stream: np.savez_compressed(stream, **value))
            case ".json":
                atomic_text(path, json.dumps(value, indent=1))
            case ".csv":
                atomic_text(path, value.to_csv(index=False))
            case other:
                raise ValueError(f"no artifact format for '{other}'")

    def load(self, filename: str) -> Any:
        """The newest artifact of that name; UserError when no stage so far has left it."""
        path = self._find(filename)
        if path is None:
            done = ", ".join(stage.name for stage in self.stages) or "none"
            raise UserError(
                f"stage {self.stage} needs '{filename}', which no stage before it left "
                f"(stages so far: {done})"
            )
        match path.suffix:
            case ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    return dict(arrays)
            case ".json":
                return json.loads(path.read_text())
            case _:
                return pd.read_csv(path)

    def has(self, filename: str) -> bool:
        """Whether this or an earlier stage left an artifact of that name."""
        return self._find(filename) is not None

    def figure(self, filename: str, figure: "Figure", dpi: int = 120) -> None:
        """Leave a figure as PNG."""
        path = self._write_to("figures", filename)
        atomic_write(path, lambda stream: figure.savefig(stream, format="png", dpi=dpi))

    def history(self, stage: str) -> pd.DataFrame:
        """The epoch rows of a fit: one column a number."""
        files = [f / "metrics.jsonl" for f in self._folders()]
        rows = [row for file in files if file.exists() for row in read_rows(file)]
        chosen = [row for row in rows if row["stage"] == stage and row["kind"] == "epoch"]
        return pd.DataFrame(chosen)

    @property
    def fit_stages(self) -> list[str]:
        """Names of the earlier stages that trained something, in order."""
        return [s.name for s in self.stages if len(self.history(s.name))]

    def progress(self, iterable: Iterable[Any], description: str) -> "tqdm[Any]":
        """The iterable with a progress bar, silent when stderr is not a terminal."""
        return tqdm(iterable, desc=f"{self.stage} {description}", disable=None, leave=False)

    # ------------------------------------------------------------- files

    def _write_to(self, kind: str, filename: str) -> Path:
        assert self._entry is not None
        path = self._entry.path / kind / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _folders(self) -> list[Path]:
        """The folders of this and earlier stages, newest first."""
        assert self._entry is not None
        done = [f"{n}_{s.name}" for n, s in enumerate(self.stages, 1)]
        return [self._entry.path, *(self.folder / "stages" / name for name in reversed(done))]

    def _find(self, filename: str) -> Path | None:
        paths = (folder / "artifacts" / filename for folder in self._folders())
        return next((path for path in paths if path.exists()), None)


@dataclass
class Order:
    """A fit, as the main process hands it out: with the weights and the terms as it has them."""

    cfg: DictConfig
    model: nn.Module
    terms: dict[str, nn.Module]
    settings: config.Fit
    seed: int
    stage: str
    name: str
    # Of its checkpoints, to which every process writes that has a part of the model.
    folder: Path


# ----------------------------------------------------------------- from config to objects


def build_stage(node: DictConfig) -> Any:
    """The stage a node describes: its schema gives plain values, open fields are instantiated."""
    if not issubclass(OmegaConf.get_type(node) or object, config.Stage):
        return instantiate(node, _convert_="all")
    settings = OmegaConf.to_object(node)
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}  # type: ignore[arg-type]
    values |= {f: instantiate(values[f], _convert_="all") for f in OPEN if values.get(f)}
    return get_class(values["_target_"])(**values)


# Fields of the fit schema that hold `_target_` nodes.
OPEN = ("sampler", "augment", "metrics")


def init_from(model: nn.Module, path: Path, log: logging.Logger) -> None:
    """Start from another run's checkpoint: every parameter of the same name and shape.

    Says how many it left as they were; UserError when none fits.
    """
    state = checkpoint.load(path)
    own = model.state_dict()
    fits = {k: v for k, v in state["model"].items() if k in own and v.shape == own[k].shape}
    if not fits:
        raise UserError(f"init_from={path} fits no parameter of this model; compare model=")
    model.load_state_dict(fits, strict=False)
    left = sorted(set(own) - set(fits))
    log.info("init_from: %d of %d tensors from %s", len(fits), len(own), path)
    if left:
        log.warning("init_from: not in that checkpoint, left as initialised: %s", ", ".join(left))
