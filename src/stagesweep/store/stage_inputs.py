"""The inputs of each stage, by its config, and the fingerprints of the stages."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import MissingFile
from stagesweep.config import schema
from stagesweep.config.nodes import has_parts, target_names
from stagesweep.store.fingerprint import ImportCache, fingerprint
from stagesweep.store.listed_files import listed_files


def fingerprints(cfg: DictConfig, numerics: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprint of every stage, in order. Imports and builds nothing that a stage needs.

    ``numerics``: settings of the hardware that change results, as this machine has them.
    """
    weights = initial_weights(cfg)
    previous = None if weights is None else hash_path(weights)
    found: dict[str, str] = {}
    cache: ImportCache = {}
    for name, given in inputs(cfg, numerics).items():
        previous = found[name] = fingerprint(given, code_modules(given), previous, cache)
    return found


def inputs(cfg: DictConfig, numerics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everything in the config that can change what a stage computes, for every stage."""
    data = _with_content(relevant(cfg.data), required=("path",))
    shared = {"data": data, "seed": cfg.seed, **numerics}
    return {
        str(name): {
            "name": name,
            "stage": relevant(node),
            "model": _relevant_model(cfg.model, node),
            "loss": {term: relevant(cfg.loss[term]) for term in sorted(_loss_terms(node))},
            **shared,
        }
        for name, node in cfg.stage.items()
    }


def code_modules(inputs: dict[str, Any]) -> list[str]:
    """The modules whose source a stage runs: the fit loop, and those that its config names."""
    return ["stagesweep.core.fit", *sorted({t.rpartition(".")[0] for t in target_names(inputs)})]


def initial_weights(cfg: DictConfig) -> Path | None:
    """The file that ``init_from`` names: a checkpoint, or the weights in the folder of a stage."""
    if cfg.init_from is None:
        return None
    path = Path(cfg.init_from)
    return path / "weights.pt" if path.is_dir() else path


def relevant(node: Any) -> Any:
    """A config node as plain values, without the fields that change no result."""
    if not isinstance(node, DictConfig):
        return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    skipped = fields_without_effect(node)
    return {str(k): relevant(v) for k, v in node.items() if k not in skipped}


def fields_without_effect(node: DictConfig) -> set[str]:
    """The fields of a config node that change no result."""
    kind = OmegaConf.get_type(node)
    if kind is None or not is_dataclass(kind):
        return set()
    return {f.name for f in fields(kind) if not f.metadata.get("fingerprint", True)}


def _relevant_model(model: Any, stage: Any) -> Any:
    """The model config that a stage reads: all of it but the keys in ``model_unused`` of the stage,
    or the parts that the stage names.

    Parts that an earlier stage has read are covered by the fingerprint of that stage.
    """
    if not has_parts(model):
        unused = (stage.get("model_unused") or ()) if isinstance(stage, DictConfig) else ()
        found = _with_content(relevant(model))
        return {key: value for key, value in found.items() if key not in unused}
    return {part: _with_content(relevant(model[part])) for part in sorted(_parts(stage))}


# Keys of data and models that name a file or folder, or else something that is elsewhere (a
# checkpoint by its name).
FILES = ("path", "features", "pretrained")


def _with_content(node: Any, required: Collection[str] = ()) -> Any:
    """Replace the paths in a node by content hashes. The files of ``required`` keys must exist."""
    if not isinstance(node, dict):
        return node
    return node | {key: digest for key, (_, digest) in file_hashes(node, required).items()}


def file_hashes(node: Any, required: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """What a node of data or of a model reads: key -> what it is called, and a hash of it.

    Where ``columns.path`` names a column of files (recordings, images), these are the key
    ``files``. Their names, sizes and times count, as for a folder.
    """
    if not isinstance(node, dict):
        return {}
    found: dict[str, tuple[str, str]] = {}
    for key in FILES:
        value = node.get(key)
        if isinstance(value, str) and (key in required or Path(value).exists()):
            found[key] = value, hash_path(Path(value))
    columns = node.get("columns")
    if "path" in found and isinstance(columns, dict) and columns.get("path"):
        table = Path(node["path"])
        names = listed_files(table, str(columns["path"]))
        found["files"] = f"files that {table} names", hash_stats(table.parent, names)
    return found


def _parts(node: Any) -> set[str]:
    """The parts of the model that a stage uses, itself or in a fit among its fields."""
    if not isinstance(node, DictConfig):
        return set()
    own = {str(node.part)} if node.get("part") is not None else set()
    return own.union(*(_parts(value) for value in node.values()))


def _loss_terms(node: Any) -> set[str]:
    """The loss terms that a stage uses, itself or in a fit among its fields."""
    if not isinstance(node, DictConfig):
        return set()
    own = node.loss if issubclass(OmegaConf.get_type(node) or object, schema.Fit) else {}
    used = {str(term) for term, use in own.items() if use.weight > 0}
    return used.union(*(_loss_terms(value) for value in node.values()))


def hash_path(path: Path) -> str:
    """Hash the content of a file, or the names, sizes and times of all files of a folder."""
    if not path.exists():
        raise MissingFile(f"no such file or folder: {path}", str(path))
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return hash_stats(path, [str(file.relative_to(path)) for file in files])


def hash_stats(folder: Path, names: Iterable[str]) -> str:
    """Hash names, sizes and times (ns) of files of a folder; of one that is missing, its name."""
    digest = hashlib.sha256()
    for name in names:
        try:
            stat = (folder / name).stat()
            digest.update(repr((name, stat.st_size, stat.st_mtime_ns)).encode())
        except OSError:
            digest.update(repr((name, None)).encode())
    return digest.hexdigest()
