"""Fingerprints: one hash of everything that can change what a stage computes.

A fingerprint covers the values that a stage is given, the code that it runs and the fingerprint
of the stage before it. Code is read, never executed. Each named module and everything that it
imports, directly or not, counts by its syntax tree: comments, docstrings and layout do not change
the fingerprint. Installed packages count by their version. Imports whose name is computed at run
time are not seen.
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
from typing import NamedTuple

from stagesweep.base.errors import UserError
from stagesweep.base.files import explained

_OWN = __name__.partition(".")[0]

# Code that composes, writes, locks or logs, and computes no number: a new version of it must not
# invalidate finished stages. The inputs of a stage cover the result of the config code.
CHANGES_NO_RESULT = frozenset(
    {
        "filelock",
        "hydra",
        "omegaconf",
        "tensorboard",
        "tqdm",
        f"{_OWN}.config",
        f"{_OWN}.base.compat",
        f"{_OWN}.base.errors",
        f"{_OWN}.base.files",
        f"{_OWN}.base.signals",
        f"{_OWN}.hardware.micro_batch_search",
        f"{_OWN}.hardware.profiler",
        f"{_OWN}.hardware.throughput",
        f"{_OWN}.parallel.micro_batch_size",
        f"{_OWN}.store",
        f"{_OWN}.tracking",
    }
)


class Import(NamedTuple):
    """What the import of one name runs."""

    # Modules that are run, each with what identifies its code; the names that they import.
    sources: dict[str, str]
    imports: frozenset[str]


ImportCache = dict[str, Import]

# Imports that `freeze` has read, for the rest of this process and for those forked from it.
_frozen: ImportCache = {}


def fingerprint(
    inputs: Mapping[str, object],
    modules: Iterable[str],
    previous: str | None,
    cache: ImportCache | None = None,
) -> str:
    """Hash everything that a stage computes from: 32 hexadecimal digits.

    ``inputs`` are plain values: None, bool, int, float, str, enum members, and lists, tuples and
    mappings of these. The order of a mapping's keys does not matter, that of a list does; a tuple
    equals a list, an enum member its value; 1, 1.0 and True all differ. ``modules`` are dotted
    names of the code that runs: modules, or objects in them. ``previous`` is the fingerprint of
    the stage before, None for the first. ``cache``: see :func:`sources`.

    Raises UserError for an input that is not plain, and for a module that does not exist or parse.
    """
    found = sources(modules, cache)
    return _digest({"inputs": inputs, "sources": found, "previous": previous})


def source_hash(module: str) -> str:
    """Hash the code of a module and of everything it imports: 32 hexadecimal digits."""
    return _digest(sources([module]))


def sources(modules: Iterable[str], cache: ImportCache | None = None) -> dict[str, str]:
    """Return every module that ``modules`` import, directly or not, with what identifies its code.

    That is a hash of its syntax tree, ``name==version`` for an installed package, or ``absent``
    for an import that is not found (an optional one, which counts once it is installed). The
    standard library is left out. Raises UserError when one of ``modules`` does not exist, or any
    does not parse. Calls that share a ``cache``, empty at first, read each module once.
    """
    cache = {} if cache is None else cache
    waiting = list(modules)
    for name in waiting:
        if name not in _frozen and _locate(name.partition(".")[0]) is None:
            raise UserError(f"no module for {name!r}: check its spelling, or set PYTHONPATH")
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            if (read := _frozen.get(name) or cache.get(name)) is None:
                read = cache[name] = _read_import(name)
            found |= read.sources
            waiting += read.imports
    return found


def freeze(modules: Iterable[str]) -> None:
    """Fix the sources of modules that this process has imported, and of all that they import.

    The process runs this code even if the files change later.
    """
    cache: ImportCache = {}
    sources(modules, cache)
    _frozen.update(
        {name: read for name, read in cache.items() if read.sources.keys() <= sys.modules.keys()}
    )


def _read_import(name: str) -> Import:
    """Read the modules that importing ``name`` runs."""
    found: dict[str, str] = {}
    imports: set[str] = set()
    # Importing a.b.c runs a, then a.b, then a.b.c (which may be an object and no module).
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
        found[module], more = _read_module(module, spec)
        imports |= more
    return Import(found, frozenset(imports))


def _locate(module: str) -> ModuleSpec | None:
    """Find a module without running the packages that it lies in, which importlib would do."""
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

    A version identifies the source only if both change together. That does not hold for this
    package and for packages that depend on it, whose authors edit them in place.
    """
    location = Path(spec.origin or next(iter(spec.submodule_search_locations or ()), ""))
    if package == _OWN or not {"site-packages", "dist-packages"} & set(location.parts):
        return None
    return _distribution_versions(package)


@cache
def _distribution_versions(package: str) -> str | None:
    installed = _distributions(package)
    requirements = [line for each in installed for line in each.requires or ()]
    if any(re.match(rf"{_OWN}(?![\w.-])", line) for line in requirements):
        return None
    return ",".join(sorted({f"{each.name}=={each.version}" for each in installed})) or None


def _distributions(package: str) -> list[metadata.Distribution]:
    try:
        return [metadata.distribution(package)]
    except metadata.PackageNotFoundError:  # such as sklearn, which is in scikit-learn
        names = {each.name for each in metadata.distributions() if _provides(each, package)}
        return [metadata.distribution(name) for name in names]


def _provides(distribution: metadata.Distribution, package: str) -> bool:
    """Whether a distribution has a package; faster than packages_distributions()."""
    if (listed := distribution.read_text("top_level.txt")) is not None:
        return package in listed.split()
    return (
        re.search(rf"^{package}[/.]", distribution.read_text("RECORD") or "", re.MULTILINE)
        is not None
    )


def _read_module(module: str, spec: ModuleSpec) -> tuple[str, frozenset[str]]:
    """Hash one module and list the dotted names that it imports."""
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
            node.body = [line for line in body if not _changes_no_result(line)]  # type: ignore[attr-defined]
    text = ast.dump(tree, annotate_fields=False)
    return hashlib.sha256(text.encode()).hexdigest(), frozenset(_imports(tree, package))


def _changes_no_result(statement: ast.stmt) -> bool:
    """Whether a statement changes no result: a docstring, a version, imports for type checkers."""
    match statement:
        case ast.Expr(value=ast.Constant()) | ast.Assign(targets=[ast.Name(id="__version__")]):
            return True
        case ast.If(test=ast.Name(id=name) | ast.Attribute(attr=name), orelse=[]):
            return name == "TYPE_CHECKING"
    return False


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names that ``tree`` imports, at any depth; a.b for ``from a import b``."""
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
    """Write a plain value as text that is equal for equal values only."""
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
