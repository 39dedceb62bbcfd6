"""Runs the stages of a config one after the other, each from the store if it is there.

Imports no torch until a stage has to run: a run that reuses all of them saves those seconds.
"""

import logging
import math
import shutil
import socket
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from stagesweep.base import signals
from stagesweep.base.errors import Interrupted, Pruned, UserError
from stagesweep.base.files import atomic_text
from stagesweep.config import schema
from stagesweep.config.messages import explain
from stagesweep.config.nodes import as_typed
from stagesweep.run import result
from stagesweep.run.hyperparameters import write_hyperparameters
from stagesweep.run.result import MEASURED, StageResult
from stagesweep.store.store import Entry, Store
from stagesweep.tracking.tensorboard import TensorBoardWriter, read_rows

if TYPE_CHECKING:
    from stagesweep.run.context import Context

log = logging.getLogger(__name__)

# The value of the objective, one for each of several, or None for a run that was pruned.
Objective = float | list[float] | None


def run_stages(cfg: DictConfig, fingerprints: dict[str, str]) -> Objective:
    """Run every stage of a valid config in this process; see `execute` for the returned value."""
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    runner = Runner(cfg, fingerprints, folder, overrides=as_typed(hydra.overrides.task))
    try:
        with signals.handled():
            runner.run()
            return runner.finish()
    except Pruned as error:
        log.info("%s", error)
        runner.write_result("pruned", str(error))
        return None
    except BaseException as error:
        status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        runner.write_result(status, explain(error) or str(error) or type(error).__name__)
        raise
    finally:
        runner.writer.close()


class Runner:
    """Executes the stages of one composed config and writes the folder of the run."""

    def __init__(
        self, cfg: DictConfig, fingerprints: dict[str, str], folder: Path, overrides: list[str]
    ) -> None:
        self.cfg, self.fingerprints = cfg, fingerprints
        self.folder, self.overrides = folder, overrides
        self.store = Store.default()
        self.stages: list[StageResult] = []
        self.started = perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        # Files of an earlier run in this folder; they are restored from the store.
        if (folder / "result.json").exists():
            for name in ("stages", "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        atomic_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        self.writer = TensorBoardWriter(folder / "tensorboard")

    @cached_property
    def context(self) -> "Context":
        """The context of the stages, made when the first one has to run."""
        from stagesweep.run.context import Context
        from stagesweep.run.model_checks import check_stages

        context = Context(self.cfg, self.folder, self.stages, self.writer)
        check_stages(context)
        return context

    def run(self) -> None:
        """Run or reuse every stage in order."""
        for number, (name, fingerprint) in enumerate(self.fingerprints.items(), 1):
            self.run_stage(number, name, self.store.entry(fingerprint))

    def run_stage(self, number: int, name: str, entry: Entry) -> None:
        """Reuse a stage from the store, or run it while no other process may."""
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
                    status, metrics = self.context.run_stage(name, entry, started)
                    measured = self.context.measured
                except BaseException:
                    entry.publish(folder)
                    raise
            shutil.rmtree(folder, ignore_errors=True)
            entry.publish(folder)
        self.copy_rows(folder, to_tensorboard=status == "reused")
        seconds = perf_counter() - started
        stage = StageResult(name, status, seconds, entry.fingerprint, metrics, **measured)
        self.stages.append(stage)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:6])
        log.info("%s: %s in %.1f s%s", name, status, seconds, shown and f" ({shown})")
        self.write_result("running")

    def reusable(self, name: str, entry: Entry) -> dict[str, Any] | None:
        """The manifest of a finished stage; None when the stage has to run."""
        if self.cfg.resume is schema.Resume.never or (manifest := entry.manifest) is None:
            return None
        if damage := entry.damage():
            log.warning("%s: runs again, its entry is damaged: %s", name, damage)
            entry.discard()
            return None
        return manifest

    def copy_rows(self, folder: Path, to_tensorboard: bool) -> None:
        """Append a stage's rows to the run's metrics.jsonl, and to TensorBoard if reused."""
        source = folder / "metrics.jsonl"
        if not source.exists():
            return
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(source.read_text())
        for row in read_rows(source) if to_tensorboard else ():
            self.writer.row(row)

    # ------------------------------------------------------------- the result

    def finish(self) -> float | list[float]:
        """Write the result and the hyperparameters; return the value of the objective."""
        values = self.objectives()
        self.write_result("complete")
        metrics = {name: number for name, number in self.metrics().items() if math.isfinite(number)}
        chosen = dict(text.lstrip("+~").partition("=")[::2] for text in self.overrides)
        write_hyperparameters(self.writer, chosen, metrics)
        line = ", ".join(f"{name} = {value:.6g}" for name, value in values.items())
        log.info("%s; results in %s", line, self.folder)
        multiple = not isinstance(self.cfg.objective.metric, str)
        return list(values.values()) if multiple else next(iter(values.values()))

    def metrics(self) -> dict[str, float]:
        """The metrics of all stages so far, as ``<stage>/<metric>``."""
        return result.all_metrics(self.stages)

    def objectives(self) -> dict[str, float]:
        """The value of each objective; UserError lists the metrics when one is missing."""
        names, metrics = list(schema.objectives(self.cfg.objective)), self.metrics()
        for name in names:
            if name not in metrics:
                have = ", ".join(sorted(metrics))
                raise UserError(
                    f"objective.metric={name} is not a metric of this run; there are {have}"
                )
        return {name: metrics[name] for name in names}

    def write_result(self, status: str, reason: str | None = None) -> None:
        """Write result.json: the status of the run and every metric so far."""
        metrics, metric = self.metrics(), self.cfg.objective.metric
        names = schema.objectives(self.cfg.objective)
        values = [{"name": name, "value": metrics.get(name)} for name in names]
        content = {
            "status": status,
            "reason": reason,
            "experiment": self.cfg.experiment,
            "objective": values[0] if isinstance(metric, str) else values,
            "metrics": metrics,
            "seconds": perf_counter() - self.started,
            "seed": self.cfg.seed,
            "host": socket.gethostname(),
            "stages": [asdict(stage) for stage in self.stages],
        }
        result.write(self.folder, content)
