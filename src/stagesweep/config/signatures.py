"""Binds config nodes to the signature of their ``_target_``, before it is called."""

import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pkgutil import resolve_name
from typing import Any, Literal, Union, get_args, get_origin

from stagesweep.base.errors import UserError
from stagesweep.config import trust
from stagesweep.config.bounds import check_bounds
from stagesweep.config.messages import nearest
from stagesweep.config.nodes import Node, target_nodes

# Keys that Hydra's instantiate does not pass on.
SPECIAL = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_", "_execution_whitelist_")


# Packages of ours whose classes and functions a config may name.
OURS = tuple(
    f"stagesweep.{package}." for package in ("systems", "stage", "metric", "loss", "model", "data")
)


def locate(path: str, name: Any) -> Callable[..., Any]:
    """Import what a ``_target_`` names; UserError if it is not trusted or does not exist.

    Of the libraries, only classes of the kind that the key expects are trusted: a function, or a
    class of another kind, may read or write files.
    """
    if not isinstance(name, str):
        raise UserError(f"{path}._target_ must be the dotted name of a class or function")
    if not trust.matches(name, trust.trusted()):
        raise _untrusted(path, name)
    mine = trust.matches(name, trust.added)
    if name.startswith("stagesweep.") and not mine and not name.startswith(OURS):
        raise UserError(f"{path}._target_: '{name}' cannot be named in a config")
    try:
        found = resolve_name(name)
    except Exception as error:
        raise UserError(f"{path}._target_: cannot load '{name}': {_why(name, error)}") from error
    if not callable(found):
        raise UserError(f"{path}._target_: '{name}' is not a class or function")
    if not mine:
        _check_kind(path, name, found)
    return found  # type: ignore[no-any-return]


def locate_all(path: str, value: Any) -> None:
    """`locate` every target of nested plain values, before they are instantiated."""
    for place, node in target_nodes(value, path):
        locate(place, node["_target_"])


def _untrusted(path: str, name: str) -> UserError:
    return UserError(
        f"{path}._target_: '{name}' is not trusted; if it is yours, "
        f"export {trust.VARIABLE}={name.partition('.')[0]}"
    )


def _check_kind(path: str, name: str, found: Any) -> None:
    """Check that an object is defined where it may be, and is of the kind that the key expects."""
    home = getattr(found, "__module__", None) or ""
    if name.startswith("stagesweep."):
        # A function of another package that a module of ours imports is not ours.
        if not (f"{home}." + getattr(found, "__qualname__", "")).startswith(OURS):
            raise UserError(f"{path}._target_: '{name}' cannot be named in a config")
        return
    kind, label = _expected_kind(path, name)
    inside = home.startswith(("torch.", "sklearn.", "optuna."))
    if not (inside and isinstance(found, type) and kind is not None and issubclass(found, kind)):
        raise UserError(
            f"{path}._target_: '{name}' is not {label}; if you trust it, "
            f"export {trust.VARIABLE}={name}"
        )


def _expected_kind(path: str, name: str) -> tuple[type | None, str]:
    """The base class of a library that the key expects, None for none, and what to call it."""
    key = path.rpartition(".")[2].partition("[")[0]
    library = name.partition(".")[0]
    if key == "optimizer":
        from torch.optim import Optimizer

        return Optimizer, "a torch optimizer"
    if "pruner" in key:
        from optuna.pruners import BasePruner

        return BasePruner, "an Optuna pruner"
    if library == "optuna":
        from optuna.samplers import BaseSampler

        is_sampler = path.startswith("hydra.sweeper.sampler")
        return (BaseSampler, "an Optuna sampler") if is_sampler else (None, "a class for this key")
    if path.startswith("hydra."):
        return None, "an Optuna sampler"
    if library == "sklearn":
        from sklearn.base import BaseEstimator

        return BaseEstimator, "a scikit-learn estimator"
    from torch.nn import Module

    return Module, "a torch module"


def _why(name: str, error: Exception) -> str:
    module, _, attribute = name.rpartition(".")
    try:
        known = [key for key in vars(resolve_name(module)) if not key.startswith("_")]
    except Exception:
        return str(error)
    return f"no '{attribute}' in {module}; {nearest(attribute, known)}"


def bind(path: str, node: Node, supplied: Collection[str] = ()) -> None:
    """Check that the keys of a node are the arguments of its target, complete and of their types.

    ``supplied`` are arguments that the framework adds. Raises UserError with the key.
    """
    target = locate(path, node["_target_"])
    try:
        signature = inspect.signature(target, eval_str=True)
    except (ValueError, TypeError, NameError):
        return  # a C function, or annotations that are imported for type checkers only
    name = node["_target_"].rpartition(".")[2]
    parameters = {n: p for n, p in signature.parameters.items() if p.kind not in (_ARGS, _KWARGS)}
    open_ended = len(parameters) < len(signature.parameters)
    for key in node:
        if key not in SPECIAL and not open_ended and (key not in parameters or key in supplied):
            known = [n for n in parameters if n not in supplied]
            raise UserError(f"{path}.{key}: {name} takes no such argument; {nearest(key, known)}")
    if not (node.get("_partial_") or "_args_" in node):
        for key, parameter in parameters.items():
            if parameter.default is _EMPTY and key not in node and key not in supplied:
                raise UserError(f"{path}: {name} needs '{key}'; add {path}.{key}=<value>")
    for key, value in node.items():
        if key in parameters and not fits(value, parameters[key].annotation):
            expected = _type_name(parameters[key].annotation)
            raise UserError(f"{path}.{key}={value}: {name} expects {expected}")
    if is_dataclass(target):
        for field in fields(target):
            if field.metadata and field.name in node:
                check_bounds(f"{path}.{field.name}", node[field.name], field.metadata)


_EMPTY = inspect.Parameter.empty
_ARGS, _KWARGS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value matches an annotation; True for annotations that are not understood."""
    if isinstance(value, dict) and "_target_" in value:
        return True  # instantiated before the target is called
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint is None or hint is type(None):
        return value is None
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Enum):
        return isinstance(value, kind) or value in kind.__members__
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, bool):
        return isinstance(value, kind)
    if issubclass(kind, Mapping):
        return isinstance(value, dict) and all(fits(v, args[1]) for v in value.values() if args)
    return _fits_collection(value, kind, args)


def _fits_collection(value: Any, kind: type, args: tuple[Any, ...]) -> bool:
    if kind is tuple and args and args[-1] is not Ellipsis:
        right = isinstance(value, list) and len(value) == len(args)
        return right and all(fits(v, arg) for v, arg in zip(value, args, strict=True))
    if kind in (list, tuple, set, frozenset, Sequence, Collection):
        return isinstance(value, list) and all(fits(v, args[0]) for v in value if args)
    return True


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("collections.abc.", "").replace("typing.", "")
