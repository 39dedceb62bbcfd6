"""What a stage runs in: all that it may ask for, and what it leaves behind."""

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from stagesweep.base import trial
from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, atomic_write
from stagesweep.base.seeding import derive, rng_state, seed_everything, set_rng_state
from stagesweep.base.spec import Spec
from stagesweep.base.view import View
from stagesweep.config import access, schema
from stagesweep.core import checkpoint
from stagesweep.core.fit import Loop
from stagesweep.core.predict import predict
from stagesweep.data.derived import Made, restored
from stagesweep.hardware.profile import resolve
from stagesweep.hardware.profiler import tracing
from stagesweep.parallel.process_group import current_group
from stagesweep.run.build import build_stage, built, init_from, of_part
from stagesweep.store import stage_inputs
from stagesweep.store.metric_log import MetricLog, NullMetricLog
from stagesweep.store.store import Entry
from stagesweep.store.tensorboard import TensorBoardWriter, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from stagesweep.run.runner import StageResult

log = logging.getLogger(__name__)


class Run:
    """The run as its stages see it. ``stages`` are those before the one that runs now."""

    def __init__(
        self,
        cfg: DictConfig,
        folder: Path = Path(),
        stages: "Sequence[StageResult]" = (),
        board: TensorBoardWriter | None = None,
    ) -> None:
        self.cfg, self.folder, self.stages, self.board = cfg, folder, stages, board
        self.log = log
        # As the profile says, and as it says for the stage that runs now.
        self.profile = self.machine = resolve(access.hardware(cfg))
        self.device = self.machine.device
        # Name, seed and entry of the stage that runs now, its place (<experiment>/<stage>), and the
        # newest weights before it.
        self.stage, self.seed, self.place = "", cfg.seed, ""
        # The part of the model, and the data made by a stage before, that it works on; None: all of
        # the model, the data of the run.
        self.part: str | None = None
        self.made: str | None = None
        self._made: Made | None = None
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
        self.turn_to(getattr(stage, "part", None), getattr(stage, "view", None))
        fresh = self.cfg.resume is schema.Resume.never
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
        self.place = f"{self.cfg.experiment}/{name}"
        self.machine = self.profile.for_stage(self.place)
        self.measured = {"speed": {}, "oom": []}
        paths = (folder / "weights.pt" for folder in self._folders()[1:])
        weights = next((path for path in paths if path.exists()), None)
        if weights != self._weights:
            self.__dict__.pop("model", None)  # built again, with these weights, when needed
        self._weights = weights

    def turn_to(self, part: str | None = None, view: str | None = None) -> None:
        """Work on a part of the model, and on data that a stage before has left by that name."""
        if (part, view) != (self.part, self.made):
            self.__dict__.pop("model", None)
        self.part, self.made, self._made = part, view, None

    # ------------------------------------------------------------- what stages use

    @cached_property
    def given(self) -> Any:
        """The data set of the run."""
        return built(self.cfg.data)

    @property
    def data(self) -> Any:
        """The data set of the stage: that of the run, or what a stage before has made."""
        if self.made is None:
            return self.given
        if self._made is None:
            self._made = restored(self.load(f"{self.made}.npz"), self.load(f"{self.made}.json"))
        return self._made

    @data.setter
    def data(self, data: Any) -> None:
        self.given = data

    def view(self, split: str) -> Any:
        """A split of the stage's data, ready to feed this run's device."""
        return self.prepared(self.data.split(split))

    def prepared(self, view: View) -> View:
        """A view, ready to feed this run's device."""
        machine = self.machine
        return view.prepare(machine.device, machine.workers, machine.pin_memory)

    @cached_property
    def model(self) -> nn.Module:
        """The model, with the weights of the latest stage that left any, or of ``init_from``."""
        model = self.build_model()
        if trained := of_part(self._trained(), self.part):
            model.load_state_dict(trained)
        elif (path := stage_inputs.initial_weights(self.cfg)) is not None:
            init_from(model, path, self.log, self.part)
        return model

    def build_model(self) -> nn.Module:
        """A new model (or the part that the stage works on) as the config says, sized by the data
        of the stage, the same for the same seed.
        """
        if access.has_parts(self.cfg.model) and self.part is None:
            raise UserError(
                f"stage {self.stage} uses a model of several parts; set stage.{self.stage}.part to "
                f"one of: {', '.join(map(str, self.cfg.model))}"
            )
        names = [] if self.part is None else [self.part]
        node = self.cfg.model[self.part] if names else self.cfg.model
        state = rng_state()
        seed_everything(derive(self.cfg.seed, "model", *names))
        model: Any = built(node, spec=self.data.spec)
        set_rng_state(state)
        if hasattr(model, "checkpointed"):
            model.checkpointed = self.machine.activation_checkpointing
        return cast(nn.Module, model.to(self.device))

    def _trained(self) -> Mapping[str, Any]:
        """The newest weights that a stage has left, those of all parts so far; none at first."""
        return {} if self._weights is None else checkpoint.load(self._weights)["model"]

    def fit(
        self,
        model: nn.Module,
        settings: schema.Fit,
        name: str,
        views: Mapping[str, View] | None = None,
    ) -> dict[str, float]:
        """Train `model` as `settings` say; returns the numbers of the last epoch.

        `views` are `train` and `val`, by default those of the stage's data. Where the run has
        several processes, all of them take part.
        """
        assert self._entry is not None
        assert self.board is not None
        if views is None and self.made is not None:  # which other processes cannot read
            views = {split: self.data.split(split) for split in ("train", "val")}
        folder = self._entry.path / "checkpoints"
        if name != self.stage:
            folder /= name
        terms = {t: built(self.cfg.loss[t]) for t in settings.loss}
        order = Order(
            cfg=self.cfg,
            model=model,
            terms={key: term.to(self.device) for key, term in terms.items()},
            settings=settings,
            seed=derive(self.seed, name),
            stage=self.place,
            name=name,
            folder=folder,
            spec=self.data.spec,
            views=views,
        )
        rows = MetricLog(self._entry.path / "metrics.jsonl", self.board, name)
        try:
            current_group().send_task(order)
            loop = self.loop(order, rows)
            try:
                with tracing(self.machine, loop.throughput, self._entry.path / "profile", name):
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
        self.machine = self.profile.for_stage(order.stage)
        self.loop(order, NullMetricLog(order.name)).run()

    def loop(self, order: "Order", rows: MetricLog) -> Loop:
        """The fit that was ordered, as this process takes part in it."""
        return Loop(
            model=order.model,
            terms=order.terms,
            settings=order.settings,
            views=(
                {split: self.view(split) for split in ("train", "val")}
                if order.views is None
                else {split: self.prepared(view) for split, view in order.views.items()}
            ),
            spec=order.spec,
            hardware=self.machine,
            seed=order.seed,
            folder=order.folder,
            rows=rows,
            trial=trial.current() if current_group().is_main else None,
            group=current_group(),
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
        state = self.model.state_dict()
        if self.part is not None:
            others = {k: v for k, v in self._trained().items() if not k.startswith(f"{self.part}.")}
            state = {**others, **{f"{self.part}.{key}": value for key, value in state.items()}}
        checkpoint.save(self._entry.path / "weights.pt", {"model": state})

    def save_data(self, name: str, data: Made) -> None:
        """Leave data for stages after this one, whose `view` names them."""
        self.save(f"{name}.npz", data.arrays())
        self.save(f"{name}.json", data.about())

    def forget_checkpoints(self) -> None:
        """Remove the checkpoints of this stage, of whose fits nothing more is wanted."""
        assert self._entry is not None
        shutil.rmtree(self._entry.path / "checkpoints", ignore_errors=True)

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
    settings: schema.Fit
    seed: int
    stage: str
    name: str
    # Of its checkpoints, to which every process writes that has a part of the model.
    folder: Path
    spec: Spec
    # None: each process reads the data of the run itself.
    views: Mapping[str, View] | None
