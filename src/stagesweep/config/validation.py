"""All that can be known to be wrong with a composed config, before anything is allocated."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.utils import execution_whitelist
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stagesweep.base.errors import UserError
from stagesweep.base.terms import disabled_metrics
from stagesweep.config import schema, trust
from stagesweep.config.access import copied, has_parts
from stagesweep.config.messages import explain, nearest
from stagesweep.config.signatures import bind, locate, nodes

Stages = dict[str, Any]


def validate(cfg: DictConfig) -> None:
    """Raise UserError for the first thing that cannot work, naming the key and the remedy."""
    contents(form(cfg))


def contents(resolved: DictConfig) -> None:
    """What can be seen to be wrong with what a config of good form names."""
    with execution_whitelist(trust.trusted()):
        targets(resolved)
        stages = kinds(resolved)
        parts(resolved)
        for name, stage in stages.items():
            for path, settings in fits_of(f"stage.{name}", stage):
                fit(path, settings, resolved)
            if isinstance(stage, schema.ChooseClusters):
                k_range(f"stage.{name}", stage)
        order(resolved, stages)
        objective(resolved, stages)
        pruning(resolved, stages)
        for name in resolved.search.constraints:
            if name != "seconds":
                there(f"search.constraints={name}", name, resolved, stages)


def form(cfg: DictConfig) -> DictConfig:
    """What can be seen to be wrong without importing what the config names; gives it resolved."""
    resolved = complete(cfg)
    schemas(resolved)
    sharding(resolved.hardware)
    files(resolved)
    return resolved


def complete(cfg: DictConfig) -> DictConfig:
    """The config with every interpolation resolved and nothing missing."""
    resolved = copied(cfg)
    OmegaConf.set_readonly(resolved, False)
    try:
        if missing := sorted(OmegaConf.missing_keys(resolved)):
            raise UserError(f"{missing[0]} is not set; give it a value: {missing[0]}=<value>")
        OmegaConf.resolve(resolved)
    except OmegaConfBaseException as error:
        raise UserError(explain(error) or str(error)) from error
    return resolved


def schemas(node: DictConfig, path: str = "") -> None:
    """Check every node that has a schema: its keys (a + can add any), and its numbers' bounds."""
    kind = OmegaConf.get_type(node)
    known = {f.name: f.metadata for f in fields(kind)} if is_dataclass(kind) else None
    for key in node:
        value, name = node[key], f"{path}.{key!s}".lstrip(".")
        if known is not None and key not in known:
            raise UserError(f"unknown key '{name}': {nearest(str(key), known)}")
        if isinstance(value, DictConfig):
            schemas(value, name)
        for number in numbers(value):
            if known and (broken := outside(number, known[str(key)])):
                raise UserError(f"{name}={number}: {broken}")


def sharding(hardware: Any) -> None:
    """Check that nothing is asked of a divided model that it cannot do."""
    if hardware.parallel is not schema.Parallel.shard:
        return
    if hardware.micro_batch == schema.AUTO:
        raise UserError(
            "hardware.micro_batch=auto finds what fits by running out of memory, which processes "
            "of hardware.parallel=shard cannot do alone; set it to a number"
        )
    if hardware.compile:
        raise UserError(
            "hardware.compile=true does not go with hardware.parallel=shard; set one of them"
        )


def numbers(value: Any) -> list[Any]:
    """The values of a list or mapping, or the one value."""
    if isinstance(value, DictConfig):
        return list(value.values())
    return list(value) if isinstance(value, Container) else [value]


def outside(number: Any, rule: Any) -> str | None:
    """What a number should have been; None when it is well."""
    if isinstance(number, str) and (word := rule.get("word")):
        return None if number == word else f"must be a number or {word}"
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    if not math.isfinite(number):
        return "must be finite"
    if number < rule.get("least", -math.inf):
        return f"must be at least {rule['least']}"
    if number <= rule.get("above", -math.inf):
        return f"must be above {rule['above']}"
    if number >= rule.get("below", math.inf):
        return f"must be below {rule['below']}"
    return None


def files(cfg: DictConfig) -> None:
    """Check that the files a run reads are there."""
    for key in ("data.path", "init_from"):
        path = OmegaConf.select(cfg, key)
        if isinstance(path, str) and not Path(path).exists():
            raise UserError(f"{key}={path}: no such file or folder (looked from {Path.cwd()})")


def targets(cfg: DictConfig) -> None:
    """Bind every `_target_` node outside the schemas to the signature of its target."""
    plain = OmegaConf.to_container(cfg)
    for path, node in nodes(plain):
        owner = OmegaConf.select(cfg, path)
        if not is_dataclass(OmegaConf.get_type(owner)):
            bind(path, node, supplied=("spec",) if path in models(cfg) else ())
        elif path.endswith(".optimizer"):
            optimizer(path, node)


def models(cfg: DictConfig) -> list[str]:
    """The paths of the model, or of its parts."""
    return [f"model.{part!s}" for part in cfg.model] if has_parts(cfg.model) else ["model"]


def parts(cfg: DictConfig) -> None:
    """Check that a stage names a part of the model where, and only where, the model has parts."""
    known = [str(part) for part in cfg.model] if has_parts(cfg.model) else []
    for path, node in using_model(cfg.stage, "stage"):
        if node.part is None and known:
            raise UserError(
                f"{path}.part: the model has parts; set it to one of {', '.join(known)}"
            )
        if node.part is not None and node.part not in known:
            hint = nearest(node.part, known) if known else "the model has no parts; leave it null"
            raise UserError(f"{path}.part={node.part}: no such part of the model; {hint}")


def using_model(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Every node that may name a part of the model, by dotted path."""
    if isinstance(node, DictConfig):
        if "part" in node:
            yield path, node
        for key in node:
            yield from using_model(node[key], f"{path}.{key!s}")


def optimizer(path: str, node: dict[str, Any]) -> None:
    """Check that an optimizer is one."""
    from torch.optim import Optimizer

    found = locate(path, node["_target_"])
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise UserError(f"{path}._target_: '{node['_target_']}' is no torch optimizer")


def kinds(cfg: DictConfig) -> Stages:
    """The stages in order: the settings of those with a schema, plain values of the others."""
    if not cfg.stage:
        raise UserError("a run needs at least one stage; choose an experiment or add +stage@…")
    stages: Stages = {}
    for name, node in cfg.stage.items():
        path = f"stage.{name}"
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UserError(f"{path} is no stage; add one with '+stage@{path}=<kind>'")
        found = locate(path, node._target_)
        stages[str(name)] = settings = OmegaConf.to_object(node)
        if isinstance(settings, schema.Stage) and not (
            isinstance(found, type) and issubclass(found, type(settings))
        ):
            kind = type(settings).__name__
            raise UserError(f"{path}._target_: '{node._target_}' does not inherit config.{kind}")
    return stages


def fits_of(path: str, stage: Any) -> Iterator[tuple[str, schema.Fit]]:
    """The fit settings of a stage: its own, or those of its fields."""
    if isinstance(stage, schema.Fit):
        yield path, stage
    elif is_dataclass(stage):
        for field in fields(stage):
            yield from fits_of(f"{path}.{field.name}", getattr(stage, field.name))


def fit(path: str, settings: schema.Fit, cfg: DictConfig) -> None:
    """Check that the parts of a fit go together."""
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
    watched = {f"{path}.best.{metric}": metric for metric in settings.best}
    unheard = disabled_metrics(terms_of(settings, cfg), settings.loss)
    rules = [metric for metric in settings.early_stop if metric not in unheard]
    watched |= {f"{path}.early_stop.{metric}": metric for metric in rules}
    if settings.schedule.decay is schema.Decay.plateau:
        watched[f"{path}.schedule.metric={settings.schedule.metric}"] = settings.schedule.metric
    known = metric_names(settings, cfg)
    for key, metric in watched.items():
        if known is not None and metric not in known:
            raise UserError(f"{key}: no such metric; {nearest(metric, sorted(known))}")


def metric_names(settings: Any, cfg: DictConfig) -> set[str] | None:
    """The metrics a stage is known to have before it runs; None when that is open."""
    if not isinstance(settings, schema.Stage):
        return None
    stage = locate("stage", settings._target_)(**{f: getattr(settings, f) for f in names(settings)})
    if not hasattr(stage, "metric_names"):
        return None
    found: set[str] | None
    if not isinstance(settings, schema.Fit):
        found = stage.metric_names()
        return found
    terms = terms_of(settings, cfg)
    # What a function makes can be asked only once it is made.
    found = stage.metric_names(terms) if all(isinstance(t, type) for t in terms.values()) else None
    return found


def terms_of(settings: schema.Fit, cfg: DictConfig) -> dict[str, Any]:
    """The class (or function) of each loss term of a fit."""
    return {term: locate(f"loss.{term}", cfg.loss[term]._target_) for term in settings.loss}


def names(settings: Any) -> list[str]:
    """Names of the fields of a schema."""
    return [field.name for field in fields(settings)]


def k_range(path: str, settings: schema.ChooseClusters) -> None:
    """Check that the numbers of clusters to try are in order."""
    low, high = settings.k_range
    if low > high:
        raise UserError(f"{path}.k_range=[{low},{high}]: the smaller number comes first")


def order(cfg: DictConfig, stages: Stages) -> None:
    """Check that a stage comes after those it builds on; `init_from` stands for any of them."""
    if cfg.init_from is not None:
        return
    trained = placed = False
    for name, stage in stages.items():
        needs_model = schema.ChooseClusters | schema.InitClusters | schema.Evaluate
        if isinstance(stage, needs_model) and not trained:
            raise UserError(f"stage.{name} comes before any training; put it after a fit")
        if isinstance(stage, schema.Fit):
            trained = True
            for term, weight in stage.loss.items():
                module = cfg.loss[term]._target_.rpartition(".")[0]
                if module == "stagesweep.loss.clustering" and weight.weight > 0 and not placed:
                    raise UserError(
                        f"stage.{name}.loss.{term} needs cluster centres; put an init_clusters "
                        f"stage before stage.{name}"
                    )
        placed = placed or isinstance(stage, schema.InitClusters)


def objective(cfg: DictConfig, stages: Stages) -> None:
    """Check that the metrics a sweep steers by will be there, as far as that is known."""
    for wanted in schema.aims(cfg.objective):
        there(f"objective.metric={wanted}", wanted, cfg, stages)


def there(key: str, wanted: str, cfg: DictConfig, stages: Stages) -> None:
    """Check that a run will have a metric; ``key`` is what asks for it."""
    name, _, metric = wanted.partition("/")
    if name not in stages:
        raise UserError(f"{key}: no stage '{name}'; {nearest(name, stages)}")
    known = metric_names(stages[name], cfg)
    if known is not None and metric not in known:
        raise UserError(f"{key}: stage {name} has no '{metric}'; {nearest(metric, sorted(known))}")


def pruning(cfg: DictConfig, stages: Stages) -> None:
    """Check that a pruner will be told the metric it looks at, as far as that is known."""
    pruner = str((cfg.search.pruner or {}).get("_target_", ""))
    if not pruner or pruner.endswith("WilcoxonPruner"):  # that one looks at whole runs
        return
    wanted = cfg.search.prune_on or str(cfg.objective.metric)
    told: list[str] = []
    for name, stage in stages.items():
        if isinstance(stage, schema.Stage) and not isinstance(stage, schema.Fit):
            continue
        if (known := metric_names(stage, cfg)) is None and wanted.startswith(f"{name}/"):
            return
        told += [f"{name}/{metric}" for metric in sorted((known or set()) - {"epochs"})]
    if wanted in told:
        return
    if cfg.search.prune_on is not None:
        raise UserError(
            f"search.prune_on={wanted}: no fit gives that after each epoch; {nearest(wanted, told)}"
        )
    losses = [name for name in told if name.endswith("/val_loss")]
    example = f"set search.prune_on={losses[-1]} search.prune_mode=min" if losses else "add a fit"
    raise UserError(
        f"search/pruner looks at {wanted}, which no fit gives after each epoch; {example}"
    )
