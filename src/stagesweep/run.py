"""The story of a run: validate, then stage after stage, each from the store if it is there."""

import hashlib
import json
import logging
import math
import shutil
import socket
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from stagesweep import config
from stagesweep.core import checkpoint, interrupt
from stagesweep.core.fit import Loop, predict
from stagesweep.core.log import MetricLog, read_rows, to_board
from stagesweep.core.seeding import derive, rng_state, seed_everything, set_rng_state
from stagesweep.errors import Interrupted, UserError
from stagesweep.files import atomic_text, atomic_write
from stagesweep.fingerprint import fingerprint
from stagesweep.hardware import resolve
from stagesweep.store import Entry, Store
from stagesweep.validate import validate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float | None:
    """Execute one composed config in Hydra's output folder; returns the objective's value.

    Writes ``result.json`` there whatever happens. Raises UserError for everything a person can
    mend, Interrupted (exit status 130 or 143) when told to stop.
    """
    validate(cfg)
    hydra = HydraConfig.get()
    this = Run(cfg, Path(hydra.runtime.output_dir), overrides=list(hydra.overrides.task))
    try:
        with interrupt.handled():
            this.walk()
            return this.finish()
    except BaseException as error:
        status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        this.write_result(status, reason=str(error) or type(error).__name__)
        raise
    finally:
        this.board.close()


@dataclass
class StageResult:
    """How one stage of a run went."""

    name: str
    status: str
    seconds: float
    fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)


class Run:
    """One composed config being executed, and all that a stage may ask for."""

    def __init__(self, cfg: DictConfig, folder: Path, overrides: list[str]) -> None:
        self.cfg, self.folder, self.overrides = cfg, folder, overrides
        self.log = log
        hardware = OmegaConf.to_object(cfg.hardware)
        assert isinstance(hardware, config.Hardware)
        self.machine = resolve(hardware)
        self.device = self.machine.device
        self.store = Store.default()
        self.stages: list[StageResult] = []
        self.started = perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        # What an earlier run left in this folder comes back from the store.
        if (folder / "result.json").exists():
            for name in ("stages", "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        atomic_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        self.board = SummaryWriter(str(folder / "tensorboard"))
        self._weights: Path | None = None
        self._entry: Entry | None = None
        # Name and seed of the stage that runs now.
        self.stage, self.seed = "", cfg.seed

    # ------------------------------------------------------------- stage after stage

    def walk(self) -> None:
        """Run or reuse every stage in order."""
        previous = None if self.init_from is None else content_hash(self.init_from)
        for number, name in enumerate(self.cfg.stage, 1):
            key = fingerprint(self.inputs(name), self.modules(name), previous)
            self.one(number, name, self.store.entry(key), key)
            previous = key

    def one(self, number: int, name: str, entry: Entry, key: str) -> None:
        """One stage: from the store if it is there, else run it, alone on this machine."""
        self.stage, self.seed, self._entry = name, derive(self.cfg.seed, name), entry
        folder = self.folder / "stages" / f"{number}_{name}"
        started = perf_counter()
        with entry.hold(on_wait=self.log.info):
            manifest = self.reusable(entry)
            if manifest is not None:
                status, metrics = "reused", manifest["metrics"]
                entry.touch()
            else:
                try:
                    status, metrics = self.execute(name, entry, started)
                except BaseException:
                    entry.publish(folder)
                    raise
            shutil.rmtree(folder, ignore_errors=True)
            entry.publish(folder)
        if (folder / "weights.pt").exists():
            self._weights = folder / "weights.pt"
            if status == "reused":
                self.__dict__.pop("model", None)  # built again, with these weights, when needed
        self.copy_rows(folder, to_tensorboard=status == "reused")
        seconds = perf_counter() - started
        self.stages.append(StageResult(name, status, seconds, key, metrics))
        shown = ", ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:6])
        self.log.info("%s: %s in %.1f s%s", name, status, seconds, shown and f" ({shown})")
        self.write_result("running")

    def reusable(self, entry: Entry) -> dict[str, Any] | None:
        """The manifest of a finished stage; None when it must run (again)."""
        if self.cfg.resume is config.Resume.never or (manifest := entry.manifest) is None:
            return None
        if reason := entry.damage():
            self.log.warning("%s: runs again, its entry is damaged: %s", self.stage, reason)
            entry.discard()
            return None
        return manifest

    def execute(self, name: str, entry: Entry, started: float) -> tuple[str, dict[str, float]]:
        """Run a stage into its entry of the store; the manifest, written last, makes it count."""
        stage = build_stage(self.cfg.stage[name])
        fresh = self.cfg.resume is config.Resume.never
        partial = not fresh and any((entry.path / "checkpoints").rglob("step_*.pt"))
        about = {"experiment": self.cfg.experiment, "stage": name}
        entry.begin(fresh=fresh, about=about)
        seed_everything(self.seed)
        metrics = {key: float(value) for key, value in stage(self).items()}
        entry.commit({**about, "seconds": perf_counter() - started, "metrics": metrics})
        return "resumed" if partial else "ran", metrics

    def inputs(self, name: str) -> dict[str, Any]:
        """Everything in the config that can change what a stage computes."""
        node = self.cfg.stage[name]
        data = what_counts(self.cfg.data)
        for key, value in data.items():
            if key == "path" and value is not None:
                data[key] = content_hash(Path(value))
        return {
            "name": name,
            "stage": what_counts(node),
            "loss": {term: what_counts(self.cfg.loss[term]) for term in sorted(terms_of(node))},
            "model": what_counts(self.cfg.model),
            "data": data,
            "seed": self.cfg.seed,
            "precision": self.machine.precision,
        }

    def modules(self, name: str) -> list[str]:
        """The modules whose source a stage runs: the core, and those its config names."""
        found = targets(OmegaConf.to_container(OmegaConf.create(self.inputs(name))))
        return ["stagesweep.core.fit", *sorted({t.rpartition(".")[0] for t in found})]

    # ------------------------------------------------------------- what stages use

    @property
    def init_from(self) -> Path | None:
        """The checkpoint to start from: a file, or the weights in a stage's folder."""
        if self.cfg.init_from is None:
            return None
        path = Path(self.cfg.init_from)
        return path / "weights.pt" if path.is_dir() else path

    @cached_property
    def data(self) -> Any:
        """The data set of the run."""
        return instantiate(self.cfg.data, _convert_="all")

    def view(self, split: str) -> Any:
        """A split, ready to feed this run's device."""
        return self.data.split(split).prepare(self.device, self.machine.workers)

    @cached_property
    def model(self) -> nn.Module:
        """The model, with the weights of the latest stage that left any, or of ``init_from``."""
        model = self.build_model()
        if self._weights is not None:
            model.load_state_dict(checkpoint.load(self._weights)["model"])
        elif self.init_from is not None:
            init_from(model, self.init_from, self.log)
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
        """Train `model` as `settings` say; returns the numbers of the last epoch."""
        assert self._entry is not None
        terms = {t: instantiate(self.cfg.loss[t], _convert_="all") for t in settings.loss}
        loop = Loop(
            model=model,
            terms={key: term.to(self.device) for key, term in terms.items()},
            settings=settings,
            views={split: self.view(split) for split in ("train", "val")},
            spec=self.data.spec,
            machine=self.machine,
            seed=derive(self.seed, name),
            folder=self._entry.path / "checkpoints",
            rows=MetricLog(self._entry.path / "metrics.jsonl", self.board, name),
        )
        try:
            return loop.run()
        finally:
            loop.rows.close()

    def predict(self, split: str, names: Collection[str]) -> dict[str, np.ndarray]:
        """Model outputs and batch columns of a whole split, in order, by name.

        An output wins over a batch column of the same name; ``input/<name>`` asks for the column.
        """
        found = predict(self.model, self.view(split), names, self.machine)
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

    def copy_rows(self, folder: Path, to_tensorboard: bool) -> None:
        """Add a stage's rows to the run's metrics.jsonl, and a reused stage's to TensorBoard."""
        source = folder / "metrics.jsonl"
        if not source.exists():
            return
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(source.read_text())
        for row in read_rows(source) if to_tensorboard else ():
            to_board(self.board, row)

    def finish(self) -> float | None:
        """Write the result and the hyperparameters; returns the objective's value."""
        value = self.objective()
        self.write_result("complete")
        metrics = {k: v for k, v in self.metrics().items() if np.isfinite(v)}
        chosen = dict(text.lstrip("+~").partition("=")[::2] for text in self.overrides)
        self.board.add_hparams(chosen, metrics, run_name=".")
        self.log.info("%s = %.6g; results in %s", self.cfg.objective.metric, value, self.folder)
        return value

    def metrics(self) -> dict[str, float]:
        """All numbers of all stages so far, as ``<stage>/<metric>``."""
        return {f"{s.name}/{k}": v for s in self.stages for k, v in s.metrics.items()}

    def objective(self) -> float:
        """The number a sweep steers by; UserError names the nearest when it is missing."""
        name, metrics = self.cfg.objective.metric, self.metrics()
        if name not in metrics:
            have = ", ".join(sorted(metrics))
            raise UserError(f"objective.metric={name} is no metric of this run; there are {have}")
        return metrics[name]

    def write_result(self, status: str, reason: str | None = None) -> None:
        """Write result.json: where the run stands and every number so far."""
        name = self.cfg.objective.metric
        metrics = self.metrics()
        result = {
            "status": status,
            "reason": reason,
            "experiment": self.cfg.experiment,
            "objective": {"name": name, "value": metrics.get(name)},
            "metrics": metrics,
            "seconds": perf_counter() - self.started,
            "seed": self.cfg.seed,
            "host": socket.gethostname(),
            "stages": [asdict(stage) for stage in self.stages],
        }
        atomic_text(self.folder / "result.json", json.dumps(without_nan(result), indent=1))


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


def what_counts(node: Any) -> Any:
    """A config node as plain values, without the fields that change no result."""
    if not isinstance(node, DictConfig):
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    kind = OmegaConf.get_type(node)
    skipped = (
        {f.name for f in fields(kind) if not f.metadata.get("fingerprint", True)}
        if kind is not None and is_dataclass(kind)
        else set()
    )
    return {str(k): what_counts(v) for k, v in node.items() if k not in skipped}


def terms_of(node: Any) -> set[str]:
    """The loss terms that a stage uses, in its own fit or in one among its fields."""
    if not isinstance(node, DictConfig):
        return set()
    own = node.loss if issubclass(OmegaConf.get_type(node) or object, config.Fit) else {}
    used = {str(term) for term, use in own.items() if use.weight > 0}
    return used.union(*(terms_of(value) for value in node.values()))


def targets(value: Any) -> set[str]:
    """Every ``_target_`` in nested plain values."""
    if isinstance(value, dict):
        own = {value["_target_"]} if isinstance(value.get("_target_"), str) else set()
        return own.union(*(targets(v) for v in value.values()))
    return set().union(*(targets(v) for v in value)) if isinstance(value, list) else set()


def content_hash(path: Path) -> str:
    """Hash of a file, or of names, sizes and times of all files of a folder."""
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


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


def without_nan(value: Any) -> Any:
    """Nested plain values with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
