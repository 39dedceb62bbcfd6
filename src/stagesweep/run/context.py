"""The context of a stage: its data, model and artifacts."""

import json
import logging
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, atomic_write
from stagesweep.base.seeding import derive, rng_state, seed_everything, set_rng_state
from stagesweep.base.view import View
from stagesweep.config import nodes, schema
from stagesweep.core import checkpoint
from stagesweep.core.fit import Loop
from stagesweep.core.predict import predict
from stagesweep.data.derived import DerivedData
from stagesweep.hardware.numerics import numerics
from stagesweep.hardware.profile import resolve
from stagesweep.hardware.profiler import tracing
from stagesweep.parallel.process_group import current_group
from stagesweep.run import artifacts
from stagesweep.run.build import build, build_stage, init_from, part_weights
from stagesweep.run.fit_task import FitTask
from stagesweep.run.result import StageResult
from stagesweep.store import stage_inputs
from stagesweep.store.fingerprint import fingerprint
from stagesweep.store.store import Entry, Store
from stagesweep.tracking.metric_log import MetricLog, NullMetricLog
from stagesweep.tracking.tensorboard import TensorBoardWriter, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class Context:
    """The context of a stage, its argument ``run``.

    ``stages`` are the results of the stages before the current one.
    """

    def __init__(
        self,
        cfg: DictConfig,
        folder: Path = Path(),
        stages: Sequence[StageResult] = (),
        writer: TensorBoardWriter | None = None,
    ) -> None:
        self.cfg, self.folder, self.stages, self.writer = cfg, folder, stages, writer
        self.log = log
        # The profile of the run, and that of the current stage, which may bound its micro-batch.
        self.run_profile = self.profile = resolve(nodes.hardware_settings(cfg))
        self.device = self.profile.device
        # Name and seed of the current stage, and its path <experiment>/<stage>.
        self.stage, self.seed, self.stage_path = "", cfg.seed, ""
        # The part of the model, and the data of an earlier stage, that the current stage uses.
        # None: the whole model, the data of the run.
        self.part: str | None = None
        self.data_name: str | None = None
        self._derived: DerivedData | None = None
        # Speed of the current stage's fit, and each out-of-memory.
        self.measured: dict[str, Any] = {"speed": {}, "oom": []}
        # The current stage in the store, and the newest weights of an earlier stage.
        self._entry: Entry | None = None
        self._weights: Path | None = None

    def run_stage(self, name: str, entry: Entry, started: float) -> tuple[str, dict[str, float]]:
        """Run a stage into its entry of the store.

        The manifest is written last and marks the stage as finished. Returns the status, ``ran`` or
        ``resumed``, and the metrics. ``started`` is a time of perf_counter.
        """
        self._select_stage(name, entry)
        stage = build_stage(name, self.cfg.stage[name])
        self.select(getattr(stage, "part", None), getattr(stage, "view", None))
        fresh = self.cfg.resume is schema.Resume.never
        partial = not fresh and any((entry.path / "checkpoints").rglob("*.*"))
        about = {"experiment": self.cfg.experiment, "stage": name}
        entry.begin(fresh=fresh, about=about)
        seed_everything(self.seed)
        metrics = {key: float(value) for key, value in stage(self).items()}
        seconds = perf_counter() - started
        entry.commit({**about, "seconds": seconds, "metrics": metrics, **self.measured})
        return "resumed" if partial else "ran", metrics

    def _select_stage(self, name: str, entry: Entry) -> None:
        """Make a stage the current one; its model gets the newest weights."""
        self.stage, self.seed, self._entry = name, derive(self.cfg.seed, name), entry
        self.stage_path = f"{self.cfg.experiment}/{name}"
        self.profile = self.run_profile.for_stage(self.stage_path)
        self.measured = {"speed": {}, "oom": []}
        paths = (folder / "weights.pt" for folder in self._folders()[1:])
        weights = next((path for path in paths if path.exists()), None)
        if weights != self._weights:
            self._forget_model()
        self._weights = weights

    def select(self, part: str | None = None, view: str | None = None) -> None:
        """Use a part of the model, and the data that an earlier stage saved by that name."""
        if (part, view) != (self.part, self.data_name):
            self._forget_model()
        self.part, self.data_name, self._derived = part, view, None

    def _forget_model(self) -> None:
        """Have the model built again, with the newest weights, when it is next used."""
        self.__dict__.pop("model", None)

    # ------------------------------------------------------------- what stages use

    @cached_property
    def _run_data(self) -> Any:
        """The data set that the config names."""
        return build("data", self.cfg.data)

    @property
    def data(self) -> Any:
        """The data set of the stage: the run's, or what an earlier stage saved."""
        if self.data_name is None:
            return self._run_data
        if self._derived is None:
            name = self.data_name
            self._derived = DerivedData.from_arrays(
                self.load(f"{name}.npz"), self.load(f"{name}.json")
            )
        return self._derived

    @data.setter
    def data(self, data: Any) -> None:
        self._run_data = data

    def view(self, split: str) -> Any:
        """A split of the stage's data, ready for the device of this run."""
        return self.prepared(self.data.split(split))

    def prepared(self, view: View) -> View:
        """A view, ready for the device of this run."""
        profile = self.profile
        return view.prepare(profile.device, profile.workers, profile.pin_memory)

    @cached_property
    def model(self) -> nn.Module:
        """The model, with the newest weights of an earlier stage, or those of ``init_from``."""
        model = self.build_model()
        if trained := part_weights(self._trained(), self.part):
            model.load_state_dict(trained)
        elif (path := stage_inputs.initial_weights(self.cfg)) is not None:
            init_from(model, path, self.log, self.part)
        return model

    def build_model(self) -> nn.Module:
        """Build the model (or the part that the stage uses), sized by the data of the stage.

        Its initial weights depend on the seed alone.
        """
        if nodes.has_parts(self.cfg.model) and self.part is None:
            raise UserError(
                f"stage {self.stage} uses a model of several parts; set stage.{self.stage}.part to "
                f"one of: {', '.join(map(str, self.cfg.model))}"
            )
        names = [] if self.part is None else [self.part]
        node = self.cfg.model[self.part] if names else self.cfg.model
        state = rng_state()
        seed_everything(derive(self.cfg.seed, "model", *names))
        model: Any = build(".".join(["model", *names]), node, spec=self.data.spec)
        set_rng_state(state)
        if hasattr(model, "checkpointed"):
            model.checkpointed = self.profile.activation_checkpointing
        return cast(nn.Module, model.to(self.device))

    def _trained(self) -> Mapping[str, Any]:
        """The newest weights of an earlier stage, of all parts so far; empty at first."""
        return {} if self._weights is None else checkpoint.load(self._weights)["model"]

    def fit(
        self,
        model: nn.Module,
        settings: schema.Fit,
        name: str,
        views: Mapping[str, View] | None = None,
    ) -> dict[str, float]:
        """Train ``model``; return the metrics of the epoch whose weights it ends with.

        ``views`` are ``train`` and ``val``, by default those of the stage's data. All processes of
        the run take part. Checkpoints of a fit that is not named as the stage get a folder of
        that name.
        """
        assert self._entry is not None
        assert self.writer is not None
        if views is None and self.data_name is not None:  # artifacts that only this process has
            views = {split: self.data.split(split) for split in ("train", "val")}
        folder = self._entry.path / "checkpoints"
        if name != self.stage:
            folder /= name
        terms = {term: build(f"loss.{term}", self.cfg.loss[term]) for term in settings.loss}
        task = FitTask(
            cfg=self.cfg,
            model=model,
            terms={key: term.to(self.device) for key, term in terms.items()},
            settings=settings,
            seed=derive(self.seed, name),
            stage=self.stage_path,
            name=name,
            folder=folder,
            spec=self.data.spec,
            views=views,
        )
        rows = MetricLog(self._entry.path / "metrics.jsonl", self.writer, name)
        try:
            current_group().send_task(task)
            loop = self._loop(task, rows)
            try:
                with tracing(self.profile, loop.throughput, self._entry.path / "profile", name):
                    return loop.run()
            finally:
                measured = loop.measured()
                self.measured["oom"] += measured["oom"]
                if name == self.stage:
                    self.measured["speed"] = measured["speed"]
        finally:
            rows.close()

    def fit_apart(
        self,
        model: nn.Module,
        settings: schema.Fit,
        name: str,
        views: Mapping[str, View],
        inputs: Mapping[str, Any],
        weights: Collection[str],
    ) -> tuple[dict[str, float], str]:
        """Train as `fit` does, and store the result under a fingerprint of its own.

        For a stage of several fits that do not build on each other. A fit with equal ``inputs``
        (plain values) is reused even if other settings change. Its own settings, loss terms, seed,
        numerics and code are added to the inputs. ``weights`` names the tensors of the model that
        the fit changes; they are stored, and the model ends with them. Returns the metrics, and
        ``trained`` or ``reused``.
        """
        assert self._entry is not None
        given = {
            "name": name,
            "inputs": inputs,
            "loss": {t: stage_inputs.relevant(self.cfg.loss[t]) for t in sorted(settings.loss)},
            "seed": self.seed,
            **numerics(nodes.hardware_settings(self.cfg)),
        }
        targets = {"stage": self.cfg.stage[self.stage], "model": self.cfg.model}
        code = {name: stage_inputs.relevant(node) for name, node in targets.items()}
        modules = stage_inputs.code_modules({**code, "loss": given["loss"]})
        entry = Store.default().entry(fingerprint(given, modules, None))
        about = {"experiment": self.cfg.experiment, "stage": name}
        never = self.cfg.resume is schema.Resume.never
        with entry.hold(on_wait=log.info):
            manifest = None if never or entry.damage() else entry.manifest
            if manifest is None:
                started = perf_counter()
                entry.begin(fresh=never or bool(entry.damage()), about=about)
                own, self._entry = self._entry, entry
                try:
                    metrics = self.fit(model, settings, name, views)
                finally:
                    self._entry = own
                state = {key: value for key, value in model.state_dict().items() if key in weights}
                checkpoint.save(entry.path / "weights.pt", {"model": state})
                shutil.rmtree(entry.path / "checkpoints", ignore_errors=True)
                entry.commit({**about, "seconds": perf_counter() - started, "metrics": metrics})
            else:
                state = checkpoint.load(entry.path / "weights.pt")["model"]
                model.load_state_dict(model.state_dict() | state)
                metrics = manifest["metrics"]
                log.info("%s: %s reused", self.stage, name)
                entry.touch()
            self._add_rows(entry.path / "metrics.jsonl", name)
        return metrics, "trained" if manifest is None else "reused"

    def _add_rows(self, source: Path, name: str) -> None:
        """Add the rows of a fit that is stored apart to those of the stage, once."""
        assert self._entry is not None
        target = self._entry.path / "metrics.jsonl"
        rows = read_rows(target) if target.exists() else []
        kept = [json.dumps(row) for row in rows if row["stage"] != name]
        own = source.read_text().splitlines() if source.exists() else []
        atomic_text(target, "".join(f"{line}\n" for line in [*kept, *own]))

    def follow(self, task: FitTask) -> None:
        """Take part in a fit that the main process has sent."""
        self.profile = self.run_profile.for_stage(task.stage)
        self._loop(task, NullMetricLog(task.name)).run()

    def _loop(self, task: FitTask, rows: MetricLog) -> Loop:
        views = task.views or {split: self.data.split(split) for split in ("train", "val")}
        prepared = {split: self.prepared(view) for split, view in views.items()}
        return task.loop(prepared, self.profile, rows)

    def predict(self, split: str, names: Collection[str]) -> dict[str, np.ndarray]:
        """Model outputs and batch columns of a whole split, in order, by name.

        An output wins over a batch column of the same name; ``input/<name>`` asks for the column.
        """
        oom = self.measured["oom"]
        found = predict(self.model, self.view(split), names, self.profile, oom=oom)
        return {name: value.numpy() for name, value in found.items()}

    def save_weights(self) -> None:
        """Save the weights of the model, for later stages."""
        assert self._entry is not None
        state = self.model.state_dict()
        if self.part is not None:
            others = {k: v for k, v in self._trained().items() if not k.startswith(f"{self.part}.")}
            state = {**others, **{f"{self.part}.{key}": value for key, value in state.items()}}
        checkpoint.save(self._entry.path / "weights.pt", {"model": state})

    def save_data(self, name: str, data: DerivedData) -> None:
        """Save data for later stages, which use it by ``view: <name>``."""
        self.save(f"{name}.npz", data.arrays())
        self.save(f"{name}.json", data.metadata())

    def forget_checkpoints(self) -> None:
        """Delete the checkpoints of this stage, which a finished stage does not need."""
        assert self._entry is not None
        shutil.rmtree(self._entry.path / "checkpoints", ignore_errors=True)

    def file(self, filename: str, kind: str = "artifacts") -> Path:
        """Path of an artifact that this stage writes itself, because memory has no room for all of
        it. ``kind`` ``checkpoints`` is for the progress of a stage, from which it resumes.
        """
        return self._path(kind, filename)

    def find(self, filename: str) -> Path:
        """Path of the newest artifact of that name; UserError when no stage so far has saved it."""
        path = self._find(filename)
        if path is None:
            done = ", ".join(stage.name for stage in self.stages) or "none"
            raise UserError(
                f"stage {self.stage} needs '{filename}', which no earlier stage saved "
                f"(stages so far: {done})"
            )
        return path

    def save(self, filename: str, value: Any) -> None:
        """Save an artifact: .npz (dict of arrays), .json (plain data), .csv (DataFrame)."""
        artifacts.write(self._path("artifacts", filename), value)

    def load(self, filename: str) -> Any:
        """Load the newest artifact of that name; UserError when no stage so far has saved it."""
        return artifacts.read(self.find(filename))

    def has(self, filename: str) -> bool:
        """Whether this or an earlier stage has saved an artifact of that name."""
        return self._find(filename) is not None

    def figure(self, filename: str, figure: "Figure", dpi: int = 120) -> None:
        """Save a figure as PNG."""
        path = self._path("figures", filename)
        atomic_write(path, lambda stream: figure.savefig(stream, format="png", dpi=dpi))

    def history(self, stage: str) -> pd.DataFrame:
        """The rows of the epochs of a fit, a column for each number."""
        files = [f / "metrics.jsonl" for f in self._folders()]
        rows = [row for file in files if file.exists() for row in read_rows(file)]
        chosen = [row for row in rows if row["stage"] == stage and row["kind"] == "epoch"]
        return pd.DataFrame(chosen)

    @property
    def fit_stages(self) -> list[str]:
        """Names of the earlier stages that have trained a model, in order."""
        return [s.name for s in self.stages if len(self.history(s.name))]

    def progress(self, iterable: Iterable[Any], description: str) -> "tqdm[Any]":
        """The iterable with a progress bar, which is hidden when stderr is not a terminal."""
        return tqdm(iterable, desc=f"{self.stage} {description}", disable=None, leave=False)

    # ------------------------------------------------------------- files

    def _path(self, kind: str, filename: str) -> Path:
        """Path of a new file of this stage; its folder is made."""
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
