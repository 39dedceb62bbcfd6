"""Checks that stages are in a valid order and report the metrics that others need."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig

from stagesweep.base.errors import UserError
from stagesweep.base.terms import disabled_metrics
from stagesweep.config import schema
from stagesweep.config.messages import nearest
from stagesweep.config.signatures import locate

# Settings of each stage by name, in order; plain values where a stage has no schema.
Stages = dict[str, Any]


def check_stages(cfg: DictConfig, stages: Stages) -> None:
    """Run all checks of this module."""
    for name, stage in stages.items():
        for path, settings in fits_of(f"stage.{name}", stage):
            _check_fit(path, settings, cfg)
        if isinstance(stage, schema.ChooseClusters):
            _check_k_range(f"stage.{name}", stage)
    _check_order(cfg, stages)
    for wanted in schema.objectives(cfg.objective):
        _check_metric(f"objective.metric={wanted}", wanted, cfg, stages)
    _check_pruning(cfg, stages)
    for name in cfg.search.constraints:
        if name != "seconds":
            _check_metric(f"search.constraints={name}", name, cfg, stages)


# ------------------------------------------------------------------------------------ fits


def fits_of(path: str, stage: Any) -> Iterator[tuple[str, schema.Fit]]:
    """The fits of a stage: itself, or those among its fields."""
    if isinstance(stage, schema.Fit):
        yield path, stage
    elif is_dataclass(stage):
        for field in fields(stage):
            yield from fits_of(f"{path}.{field.name}", getattr(stage, field.name))


def _check_fit(path: str, settings: schema.Fit, cfg: DictConfig) -> None:
    """Check the loss terms of a fit, and the metrics that its rules watch."""
    for term in settings.loss:
        if term not in cfg.loss:
            raise UserError(f"{path}.loss.{term}: no such loss term; {nearest(term, cfg.loss)}")
    if not any(weight.weight > 0 for weight in settings.loss.values()):
        example = f"'+{path}.loss={{<term>: {{weight: 1}}}}'"
        raise UserError(f"{path}.loss: no term has a weight above 0; add one: {example}")
    if settings.select != "last" and settings.select not in settings.best:
        hint = nearest(settings.select, ["last", *settings.best])
        raise UserError(f"{path}.select={settings.select} is not kept by {path}.best; {hint}")
    for metric, stop in settings.early_stop.items():
        if stop.patience is None and stop.target is None:
            raise UserError(f"{path}.early_stop.{metric}: set its patience or its target")
    known = metric_names(settings, cfg)
    for key, metric in _watched(path, settings, cfg).items():
        if known is not None and metric not in known:
            raise UserError(f"{key}: no such metric; {nearest(metric, sorted(known))}")


def _watched(path: str, settings: schema.Fit, cfg: DictConfig) -> dict[str, str]:
    """The metrics that a fit watches, by the key that names them."""
    watched = {f"{path}.best.{metric}": metric for metric in settings.best}
    # A rule on the loss of a term with weight 0 is ignored, not refused; see `disabled_metrics`.
    off = disabled_metrics(_loss_classes(settings, cfg), settings.loss)
    watched |= {
        f"{path}.early_stop.{name}": name for name in settings.early_stop if name not in off
    }
    if settings.schedule.decay is schema.Decay.plateau:
        watched[f"{path}.schedule.metric={settings.schedule.metric}"] = settings.schedule.metric
    return watched


def _loss_classes(settings: schema.Fit, cfg: DictConfig) -> dict[str, Any]:
    """The class (or function) of each loss term of a fit."""
    return {term: locate(f"loss.{term}", cfg.loss[term]._target_) for term in settings.loss}


# ------------------------------------------------------------------------------------ stages


def _check_k_range(path: str, settings: schema.ChooseClusters) -> None:
    low, high = settings.k_range
    if low > high:
        raise UserError(f"{path}.k_range=[{low},{high}]: the smaller number comes first")


def _check_order(cfg: DictConfig, stages: Stages) -> None:
    """Check that each stage comes after those it needs; ``init_from`` stands for any of them."""
    if cfg.init_from is not None:
        return
    trained = has_centres = False
    for name, stage in stages.items():
        needs_model = schema.ChooseClusters | schema.InitClusters | schema.Evaluate
        if isinstance(stage, needs_model) and not trained:
            raise UserError(f"stage.{name} comes before any training; put it after a fit")
        if isinstance(stage, schema.Fit):
            trained = True
            for term, loss in _loss_classes(stage, cfg).items():
                needs_centres = getattr(loss, "needs_cluster_centres", False)
                if needs_centres and stage.loss[term].weight > 0 and not has_centres:
                    raise UserError(
                        f"stage.{name}.loss.{term} needs cluster centres; put an init_clusters "
                        f"stage before stage.{name}"
                    )
        has_centres = has_centres or isinstance(stage, schema.InitClusters)


# ------------------------------------------------------------------------------------ metrics


def metric_names(settings: Any, cfg: DictConfig) -> set[str] | None:
    """The metrics that a stage will have; None when it cannot tell before it runs."""
    if not isinstance(settings, schema.Stage):
        return None
    arguments = {field.name: getattr(settings, field.name) for field in fields(settings)}
    stage = locate("stage", settings._target_)(**arguments)
    if not hasattr(stage, "metric_names"):
        return None
    names: set[str] | None
    if not isinstance(settings, schema.Fit):
        names = stage.metric_names()
        return names
    terms = _loss_classes(settings, cfg)
    if not all(isinstance(term, type) for term in terms.values()):
        return None  # a function returns the term, which is not built yet
    names = stage.metric_names(terms)
    return names


def _check_metric(key: str, wanted: str, cfg: DictConfig, stages: Stages) -> None:
    """Check that a run will have the metric ``<stage>/<name>`` that ``key`` names."""
    name, _, metric = wanted.partition("/")
    if name not in stages:
        raise UserError(f"{key}: no stage '{name}'; {nearest(name, stages)}")
    known = metric_names(stages[name], cfg)
    if known is not None and metric not in known:
        raise UserError(f"{key}: stage {name} has no '{metric}'; {nearest(metric, sorted(known))}")


def _check_pruning(cfg: DictConfig, stages: Stages) -> None:
    """Check that a fit reports the metric that the pruner watches after each epoch."""
    pruner = str((cfg.search.pruner or {}).get("_target_", ""))
    if not pruner or pruner.endswith("WilcoxonPruner"):  # which compares whole runs
        return
    wanted = cfg.search.prune_on or str(cfg.objective.metric)
    reported: list[str] = []
    for name, stage in stages.items():
        if isinstance(stage, schema.Stage) and not isinstance(stage, schema.Fit):
            continue
        if (known := metric_names(stage, cfg)) is None and wanted.startswith(f"{name}/"):
            return
        reported += [f"{name}/{metric}" for metric in sorted((known or set()) - {"epochs"})]
    if wanted in reported:
        return
    if cfg.search.prune_on is not None:
        hint = nearest(wanted, reported)
        raise UserError(f"search.prune_on={wanted}: no fit reports it after each epoch; {hint}")
    losses = [name for name in reported if name.endswith("/val_loss")]
    example = f"set search.prune_on={losses[-1]} search.prune_mode=min" if losses else "add a fit"
    raise UserError(
        f"search/pruner watches {wanted}, which no fit reports after each epoch; {example}"
    )
