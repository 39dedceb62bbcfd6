"""Fingerprints: one hash of everything that can change what a stage computes.

A fingerprint covers the values a stage is given, the code it runs and the fingerprint of the
stage before it. Code is read, never executed: each named module and all that it imports, however
deep, counts by its syntax tree, so comments, docstrings and layout change nothing. Installed
packages count by their version. An import whose name is computed at run time is not seen.
"""

import ast
import hashlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, resolve_name
from itertools import accumulate
from pathlib import Path

from stagesweep.base.errors import UserError
from stagesweep.base.files import explained

_OWN = __name__.partition(".")[0]

# Code that composes, writes, locks or logs, and computes no number: a new version of it must not
# throw away finished work. What a config makes of a stage is in the stage's inputs already.
CHANGES_NO_RESULT = frozenset(
    {
        "filelock",
        "hydra",
        "omegaconf",
        "tensorboard",
        "tqdm",
        f"{_OWN}.config",
        f"{_OWN}.base.errors",
        f"{_OWN}.base.files",
        f"{_OWN}.base.signals",
        f"{_OWN}.hardware.micro_batch_search",
        f"{_OWN}.hardware.profiler",
        f"{_OWN}.hardware.throughput",
        f"{_OWN}.parallel.micro_batch_size",
        f"{_OWN}.store",
    }
)


# What importing a name runs, each module with what identifies its code; and what these import.
Look = tuple[dict[str, str], frozenset[str]]

# Looks that `keep` has taken for the rest of this process, and for those forked from it.
_kept: dict[str, Look] = {}


def fingerprint(
    inputs: Mapping[str, object],
    modules: Iterable[str],
    previous: str | None,
    looks: dict[str, Look] | None = None,
) -> str:
    """Hash what a stage computes from: 32 hexadecimal digits.

    ``inputs`` are plain values: None, bool, int, float, str, enum members, and lists, tuples and
    mappings of these. The order of a mapping's keys does not matter, that of a list does; a tuple
    equals a list, an enum member its value; 1, 1.0 and True all differ. ``modules`` are dotted
    names of the code that runs: modules, or objects in them. ``previous`` is the fingerprint of
    the stage before, None for the first. ``looks``: see :func:`sources`.

    An input that is not plain, a module that is not there or does not parse: a UserError.
    """
    found = sources(modules, looks)
    return _digest({"inputs": inputs, "sources": found, "previous": previous})


def source_hash(module: str) -> str:
    """Hash the code of one module and of everything it imports: 32 hexadecimal digits."""
    return _digest(sources([module]))


def sources(modules: Iterable[str], looks: dict[str, Look] | None = None) -> dict[str, str]:
    """Give every module that ``modules`` reach, and what identifies its code.

    That is a hash of its syntax tree; ``name==version`` for an installed package; or ``absent``
    for an import that cannot be found (an optional one, that will count once it is there).
    Python's own library is left out. One of ``modules`` that is not there, and any that does not
    parse, is a UserError. Calls that share ``looks``, empty at first, look at each module once.
    """
    looks = {} if looks is None else looks
    waiting = list(modules)
    for name in waiting:
        if name not in _kept and _locate(name.partition(".")[0]) is None:
            raise UserError(f"no module for {name!r}: check its spelling, or set PYTHONPATH")
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            if (look := _kept.get(name) or looks.get(name)) is None:
                look = looks[name] = _look(name)
            found |= look[0]
            waiting += look[1]
    return found


def keep(modules: Iterable[str]) -> None:
    """Take the code of modules, and of all they import, as it is now, where it is in memory: it is
    what this process runs, whatever becomes of the files.
    """
    looks: dict[str, Look] = {}
    sources(modules, looks)
    _kept.update(
        {name: look for name, look in looks.items() if look[0].keys() <= sys.modules.keys()}
    )


def _look(name: str) -> Look:
    """Look at the modules that importing ``name`` runs."""
    found: dict[str, str] = {}
    imports: set[str] = set()
    # To import a.b.c is to run a, then a.b, then a.b.c (which may be no module but an object).
    for module in accumulate(name.split("."), "{}.{}".format):
        if module in sys.stdlib_module_names or module in CHANGES_NO_RESULT:
            break
        spec = _locate(module)
        if spec is None:
            if "." not in module:
                found[module] = "absent"
            break
        version = _version(module, spec) if "." not in module else None
        if version is not None:
            found[module] = version
            break
        found[module], more = _read(module, spec)
        imports |= more
    return found, frozenset(imports)


def _locate(module: str) -> ModuleSpec | None:
    """Find a module without running any package it lies in, as importlib's own search would."""
    parent = module.rpartition(".")[0]
    if not parent:
        try:
            return find_spec(module)
        except ValueError:  # a module without a spec, such as __main__
            return None
    package = _locate(parent)
    namespace: list[str] = []
    for folder in (package and package.submodule_search_locations) or ():
        finder = pkgutil.get_importer(folder)
        spec = finder.find_spec(module) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        namespace += (spec and spec.submodule_search_locations) or ()
    if not namespace:
        return None
    portions = ModuleSpec(module, None, is_package=True)
    portions.submodule_search_locations = namespace
    return portions


def _version(package: str, spec: ModuleSpec) -> str | None:
    """``name==version`` of code that pip installed, None when its source must be read.

    A version stands for its source only where both change together: not for this package, nor
    for packages that build on it, which their author edits and installs again.
    """
    place = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), ""))
    if package == _OWN or not {"site-packages", "dist-packages"} & set(place.parts):
        return None
    return _release(package)


@cache
def _release(package: str) -> str | None:
    installed = _distributions(package)
    requirements = [line for one in installed for line in one.requires or ()]
    if any(re.match(rf"{_OWN}(?![\w.-])", line) for line in requirements):
        return None
    return ",".join(sorted({f"{one.name}=={one.version}" for one in installed})) or None


def _distributions(package: str) -> list[metadata.Distribution]:
    try:
        return [metadata.distribution(package)]
    except metadata.PackageNotFoundError:  # sklearn is in scikit-learn
        names = {one.name for one in metadata.distributions() if _provides(one, package)}
        return [metadata.distribution(name) for name in names]


def _provides(one: metadata.Distribution, package: str) -> bool:
    """Whether a distribution brings a package, as importlib.metadata would tell, but sooner."""
    if (listed := one.read_text("top_level.txt")) is not None:
        return package in listed.split()
    return re.search(rf"^{package}[/.]", one.read_text("RECORD") or "", re.MULTILINE) is not None


def _read(module: str, spec: ModuleSpec) -> tuple[str, frozenset[str]]:
    """Hash one module and list the dotted names it imports."""
    if spec.origin is None:
        return "namespace", frozenset()
    path = Path(spec.origin)
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    with explained(path):
        return _parse(path, path.read_bytes(), package)


@cache
def _parse(path: Path, content: bytes, package: str) -> tuple[str, frozenset[str]]:
    if path.suffix != ".py":
        return hashlib.sha256(content).hexdigest(), frozenset()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{path}:{line} is not valid Python: {error}; correct it") from error
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not _inert(line)]  # type: ignore[attr-defined]
    text = ast.dump(tree, annotate_fields=False)
    return hashlib.sha256(text.encode()).hexdigest(), frozenset(_imports(tree, package))


def _inert(statement: ast.stmt) -> bool:
    """Whether a statement changes no result: a docstring, a version, imports for type checkers."""
    match statement:
        case ast.Expr(value=ast.Constant()) | ast.Assign(targets=[ast.Name(id="__version__")]):
            return True
        case ast.If(test=ast.Name(id=name) | ast.Attribute(attr=name), orelse=[]):
            return name == "TYPE_CHECKING"
    return False


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Give the dotted names that ``tree`` imports, at any depth; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                base = resolve_name("." * node.level + (node.module or ""), package)
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value, "").encode()).hexdigest()[:32]


def _canonical(value: object, where: str) -> str:
    """Write a plain value as text, the same for equal values and different for different ones."""
    match value:
        case Enum():
            return _canonical(value.value, where)
        case None | bool() | int() | str():
            return json.dumps(value)
        case float():
            return float.__repr__(value)
        case list() | tuple():
            return f"[{','.join(_canonical(item, where) for item in value)}]"
        case Mapping():
            pairs = (
                (_canonical(k, where), _canonical(v, f"{where}.{k}")) for k, v in value.items()
            )
            return "{" + ",".join(f"{key}:{item}" for key, item in sorted(pairs)) + "}"
    name = where.removeprefix(".inputs").lstrip(".")
    raise UserError(
        f"{name or 'the input'} is a {type(value).__name__}, which a fingerprint cannot cover; "
        "give a number, text, list or mapping"
    )
