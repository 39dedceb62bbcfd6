"""What each stage is computed from, as its config says, and the fingerprints that follow."""

import hashlib
import pickle
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stagesweep import config
from stagesweep.errors import UserError
from stagesweep.fingerprint import Look, fingerprint
from stagesweep.hardware.gpu import numerics


def fingerprints(cfg: DictConfig) -> dict[str, str]:
    """The fingerprint of every stage, in order. Imports and builds nothing that a stage needs."""
    weights = initial_weights(cfg)
    previous = None if weights is None else content_hash(weights)
    found: dict[str, str] = {}
    looks: dict[str, Look] = {}
    for name, given in inputs(cfg).items():
        previous = found[name] = fingerprint(given, modules(given), previous, looks)
    return found


def inputs(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """Everything in the config that can change what a stage computes, for every stage."""
    data = what_counts(cfg.data)
    for key, value in data.items():
        if key == "path" and value is not None:
            data[key] = content_hash(Path(value))
    shared = {
        "data": data,
        "seed": cfg.seed,
        **numerics(hardware(cfg)),
    }
    return {
        str(name): {
            "name": name,
            "stage": what_counts(node),
            "model": model_of(cfg.model, node),
            "loss": {term: what_counts(cfg.loss[term]) for term in sorted(terms_of(node))},
            **shared,
        }
        for name, node in cfg.stage.items()
    }


def modules(given: dict[str, Any]) -> list[str]:
    """The modules whose source a stage runs: the core, and those its config names."""
    return ["stagesweep.core.fit", *sorted({t.rpartition(".")[0] for t in targets(given)})]


def initial_weights(cfg: DictConfig) -> Path | None:
    """The checkpoint to start from: a file, or the weights in a stage's folder."""
    if cfg.init_from is None:
        return None
    path = Path(cfg.init_from)
    return path / "weights.pt" if path.is_dir() else path


def hardware(cfg: DictConfig) -> config.Hardware:
    """The hardware profile."""
    settings = OmegaConf.to_object(cfg.hardware)
    assert isinstance(settings, config.Hardware)
    return settings


def copied(cfg: DictConfig) -> DictConfig:
    """A copy of a whole config, in half the time of a deep one."""
    copy: DictConfig = pickle.loads(pickle.dumps(cfg, pickle.HIGHEST_PROTOCOL))
    return copy


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


def has_parts(model: Any) -> bool:
    """Whether a model is several, ``model.<part>`` each, of which a stage names the one it uses."""
    return isinstance(model, DictConfig) and "_target_" not in model


def parts_of(node: Any) -> set[str]:
    """The parts of the model that a stage uses, itself or in a fit among its fields."""
    if not isinstance(node, DictConfig):
        return set()
    own = {str(node.part)} if node.get("part") is not None else set()
    return own.union(*(parts_of(value) for value in node.values()))


def model_of(model: Any, node: Any) -> Any:
    """What a stage reads of the model's config: all of it, or the parts that it names.

    What a stage before it has read counts by the fingerprint of that one.
    """
    if not has_parts(model):
        return what_counts(model)
    return {part: what_counts(model[part]) for part in sorted(parts_of(node))}


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
    return set().union(*(targets(v) for v in value)) if isinstance(value, list | tuple) else set()


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
