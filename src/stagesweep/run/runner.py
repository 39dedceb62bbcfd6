"""The story of a run: stage after stage, each from the store if it is there.

Imports no torch until a stage has to run: to reuse every stage takes seconds less without.
"""

import json
import logging
import math
import shutil
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from stagesweep.base import signals
from stagesweep.base.errors import Interrupted, Lost, Pruned, UserError
from stagesweep.base.files import atomic_text
from stagesweep.config.access import hardware
from stagesweep.config.messages import explain
from stagesweep.config.schema import Resume, aims
from stagesweep.config.validation import contents, form
from stagesweep.hardware import detection
from stagesweep.parallel import launch
from stagesweep.run.hyperparameters import write_hyperparameters
from stagesweep.store.stage_inputs import fingerprints
from stagesweep.store.store import Entry, Store
from stagesweep.store.tensorboard import TensorBoardWriter, read_rows

if TYPE_CHECKING:
    from stagesweep.run.context import Run

log = logging.getLogger(__name__)


def walk(cfg: DictConfig) -> float | list[float] | None:
    """Execute one composed config in Hydra's output folder; returns the objective's value.

    A list of values when ``objective.metric`` is a list; None when the sweep it belongs to had no
    more use for it.

    Writes ``result.json`` there whatever happens. Raises UserError for everything a person can
    mend, Interrupted (exit status 130 or 143) when told to stop.
    """
    detection.set_visible_gpus(hardware(cfg))
    keys, ready = checked(cfg)
    if not ready and (processes := launch.wanted(hardware(cfg))) > 1:
        try:
            return launch.start(cfg, keys, processes)
        except Lost as error:  # of which the process that writes may know nothing
            mark_failed(Path(HydraConfig.get().runtime.output_dir), str(error))
            raise
    with launch.led():
        return through(cfg, keys)


def through(cfg: DictConfig, keys: dict[str, str]) -> float | list[float] | None:
    """Every stage of a config that was found valid, in this process; see `walk`."""
    hydra = HydraConfig.get()
    this = Walk(cfg, keys, Path(hydra.runtime.output_dir), overrides=list(hydra.overrides.task))
    try:
        with signals.handled():
            this.stage_after_stage()
            return this.finish()
    except Pruned as error:
        log.info("%s", error)
        this.write_result("pruned", str(error))
        return None
    except BaseException as error:
        status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        this.write_result(status, explain(error) or str(error) or type(error).__name__)
        raise
    finally:
        this.board.close()


def mark_failed(folder: Path, reason: str) -> None:
    """Say in result.json how a run ended that could not say so itself."""
    path = folder / "result.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    atomic_text(path, json.dumps({**before, "status": "failed", "reason": reason}, indent=1))


def checked(cfg: DictConfig) -> tuple[dict[str, str], bool]:
    """The fingerprint of every stage, in order, and whether all of them can be reused; UserError
    for what cannot work, before anything is made.

    A config of which every stage is stored was found valid, with the same code, when they ran.
    """
    resolved: DictConfig | None = None
    keys: dict[str, str] | None = None
    with suppress(Exception):  # whatever is wrong, validation says it better
        resolved = form(cfg)
        keys = fingerprints(cfg)
        if cfg.resume is not Resume.never and stored(keys, list(aims(cfg.objective))):
            return keys, True
    contents(form(cfg) if resolved is None else resolved)
    from stagesweep.hardware.profile import choose_device

    choose_device(hardware(cfg))
    return (fingerprints(cfg) if keys is None else keys), False


def stored(keys: dict[str, str], metrics: list[str]) -> bool:
    """Whether every stage can be reused, and these are among their numbers."""
    entries = {name: Store.default().entry(key) for name, key in keys.items()}
    manifests = {name: entry.manifest or {} for name, entry in entries.items()}
    if not all(manifests.values()) or any(entry.damage() for entry in entries.values()):
        return False
    wanted = [name.partition("/") for name in metrics]
    return all(metric in manifests[stage]["metrics"] for stage, _, metric in wanted)


@dataclass
class StageResult:
    """How one stage of a run went."""

    name: str
    status: str
    seconds: float
    fingerprint: str
    metrics: dict[str, float] = field(default_factory=dict)
    # When it ran: how fast a fit was, and every time that memory ran out.
    speed: dict[str, float] = field(default_factory=dict)
    oom: list[dict[str, Any]] = field(default_factory=list)


# What a manifest says of how a stage went, beside its metrics.
MEASURED = ["speed", "oom"]


class Walk:
    """One composed config being executed, and what its folder says of it."""

    def __init__(
        self, cfg: DictConfig, keys: dict[str, str], folder: Path, overrides: list[str]
    ) -> None:
        self.cfg, self.keys, self.folder, self.overrides = cfg, keys, folder, overrides
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
        self.board = TensorBoardWriter(folder / "tensorboard")

    @cached_property
    def run(self) -> "Run":
        """What stages run in, made when the first one does."""
        from stagesweep.run.context import Run

        return Run(self.cfg, self.folder, self.stages, self.board)

    def stage_after_stage(self) -> None:
        """Run or reuse every stage in order."""
        for number, (name, key) in enumerate(self.keys.items(), 1):
            self.one(number, name, self.store.entry(key))

    def one(self, number: int, name: str, entry: Entry) -> None:
        """One stage: from the store if it is there, else run it, alone on this machine."""
        folder = self.folder / "stages" / f"{number}_{name}"
        started = perf_counter()
        with entry.hold(on_wait=log.info):
            if (manifest := self.reusable(name, entry)) is not None:
                status, metrics = "reused", manifest["metrics"]
                if self.cfg.hardware.profile:
                    log.info("%s: reused, so there is no new trace; resume=never makes one", name)
                measured = {key: manifest[key] for key in MEASURED if key in manifest}
                entry.touch()
            else:
                try:
                    status, metrics = self.run.execute(name, entry, started)
                    measured = self.run.measured
                except BaseException:
                    entry.publish(folder)
                    raise
            shutil.rmtree(folder, ignore_errors=True)
            entry.publish(folder)
        self.copy_rows(folder, to_tensorboard=status == "reused")
        seconds = perf_counter() - started
        key = entry.fingerprint
        self.stages.append(StageResult(name, status, seconds, key, metrics, **measured))
        shown = ", ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:6])
        log.info("%s: %s in %.1f s%s", name, status, seconds, shown and f" ({shown})")
        self.write_result("running")

    def reusable(self, name: str, entry: Entry) -> dict[str, Any] | None:
        """The manifest of a finished stage; None when it must run (again)."""
        if self.cfg.resume is Resume.never or (manifest := entry.manifest) is None:
            return None
        if damage := entry.damage():
            log.warning("%s: runs again, its entry is damaged: %s", name, damage)
            entry.discard()
            return None
        return manifest

    def copy_rows(self, folder: Path, to_tensorboard: bool) -> None:
        """Add a stage's rows to the run's metrics.jsonl, and a reused stage's to TensorBoard."""
        source = folder / "metrics.jsonl"
        if not source.exists():
            return
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(source.read_text())
        for row in read_rows(source) if to_tensorboard else ():
            self.board.row(row)

    # ------------------------------------------------------------- the result

    def finish(self) -> float | list[float]:
        """Write the result and the hyperparameters; returns the objective's value."""
        values = self.objectives()
        self.write_result("complete")
        metrics = {name: number for name, number in self.metrics().items() if math.isfinite(number)}
        chosen = dict(text.lstrip("+~").partition("=")[::2] for text in self.overrides)
        write_hyperparameters(self.board, chosen, metrics)
        said = ", ".join(f"{name} = {value:.6g}" for name, value in values.items())
        log.info("%s; results in %s", said, self.folder)
        several = not isinstance(self.cfg.objective.metric, str)
        return list(values.values()) if several else next(iter(values.values()))

    def metrics(self) -> dict[str, float]:
        """All numbers of all stages so far, as ``<stage>/<metric>``."""
        return {f"{s.name}/{k}": v for s in self.stages for k, v in s.metrics.items()}

    def objectives(self) -> dict[str, float]:
        """The numbers a sweep steers by; UserError lists what there is when one is missing."""
        names, metrics = list(aims(self.cfg.objective)), self.metrics()
        for name in names:
            if name not in metrics:
                have = ", ".join(sorted(metrics))
                raise UserError(
                    f"objective.metric={name} is no metric of this run; there are {have}"
                )
        return {name: metrics[name] for name in names}

    def write_result(self, status: str, reason: str | None = None) -> None:
        """Write result.json: where the run stands and every number so far."""
        metrics, metric = self.metrics(), self.cfg.objective.metric
        found = [{"name": name, "value": metrics.get(name)} for name in aims(self.cfg.objective)]
        result = {
            "status": status,
            "reason": reason,
            "experiment": self.cfg.experiment,
            "objective": found[0] if isinstance(metric, str) else found,
            "metrics": metrics,
            "seconds": perf_counter() - self.started,
            "seed": self.cfg.seed,
            "host": socket.gethostname(),
            "stages": [asdict(stage) for stage in self.stages],
        }
        atomic_text(self.folder / "result.json", json.dumps(without_nan(result), indent=1))


def without_nan(value: Any) -> Any:
    """Nested plain values with NaN and infinities as None: JSON has no word for them."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
