"""What each stage is computed from, as its config says, and the fingerprints that follow."""

import hashlib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.config.access import hardware, has_parts, targets
from stagesweep.hardware.numerics import numerics
from stagesweep.store.fingerprint import Look, fingerprint


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
    own = node.loss if issubclass(OmegaConf.get_type(node) or object, schema.Fit) else {}
    used = {str(term) for term, use in own.items() if use.weight > 0}
    return used.union(*(terms_of(value) for value in node.values()))


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
