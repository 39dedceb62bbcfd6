"""Import rules, length limits, and docstrings of packages.

The import rules are in pyproject.toml. Rules that import-linter cannot express are checked here by
the syntax tree.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "stagesweep"
PACKAGES = sorted(file.parent for file in PACKAGE.rglob("__init__.py"))
# The one file that uses private names of Hydra, OmegaConf, Optuna and torch.
COMPAT = PACKAGE / "base" / "compat.py"


def short(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax tree of every module."""
    return {file: ast.parse(file.read_text(), file) for file in sorted(PACKAGE.rglob("*.py"))}


# ------------------------------------------------------------------------------ imports


def copy(folder: Path) -> Path:
    """A copy of the package and of its import rules."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "src" / "stagesweep", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(checkout: Path) -> "subprocess.CompletedProcess[str]":
    """Run import-linter as `make check` does."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=checkout,
        env={"PYTHONPATH": str(checkout / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_import_rules_hold(tmp_path: Path) -> None:
    process = lint(copy(tmp_path))
    assert process.returncode == 0, process.stdout


DOWNWARDS = "Imports go downwards only"
FREE = "Framework and shared parts import no system"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import "
# The broken rule, the importing module, the lines added to it, and the module that they import.
FORBIDDEN = {
    "upwards": (DOWNWARDS, "base.files", "import ", "cli"),
    "inside a function": (DOWNWARDS, "data.split", "def f():\n    import ", "run"),
    "for type checkers alone": (DOWNWARDS, "base.errors", TYPES, "sweep"),
    "upwards inside sweep": (
        "Imports inside sweep go downwards only", "sweep.space.space", "import ", "sweep.report"
    ),
    "framework to system": (FREE, "run.plan", "import ", "systems.audiogram"),
    "shared part to system": (FREE, "loss.kl", "import ", "systems.audiogram"),
    "root to system": (
        "The package and systems themselves import no system",
        "systems", "import ", "systems.audiogram",
    ),
    "system to system": (
        "No system imports another", "systems.audiogram.loss", "import ", "systems.singlecell"
    ),
}  # fmt: skip


CIRCLE = [("", "stage.fit", "import ", "stage.score"), ("", "stage.score", "import ", "stage.fit")]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The report on each broken rule in a copy to which all forbidden imports are added."""
    checkout = copy(tmp_path_factory.mktemp("broken"))
    for _, importer, lines, imported in [*FORBIDDEN.values(), *CIRCLE]:
        module = checkout / "src/stagesweep" / importer.replace(".", "/")
        file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
        with file.open("a") as stream:
            stream.write(f"\n{lines}stagesweep.{imported}\n")
    process = lint(checkout)
    assert process.returncode == 1, process.stderr
    _, _, said = process.stdout.partition("Broken contracts")
    parts = re.split(r"^(.+)\n-+\n", said, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_forbidden_import_breaks_its_rule(broken: dict[str, str], case: str) -> None:
    rule, importer, _, imported = FORBIDDEN[case]
    assert re.search(rf"{importer}\b.*-> .*{imported}\b", broken[rule]), broken[rule]


def test_a_circle_breaks_its_rule(broken: dict[str, str]) -> None:
    assert "No cycles are allowed in stagesweep.stage." in broken["No circles between siblings"]


def test_a_package_outside_the_layers_is_reported(tmp_path: Path) -> None:
    checkout = copy(tmp_path)
    for folder in ("attic", "sweep/attic"):
        package = checkout / "src/stagesweep" / folder
        package.mkdir()
        (package / "__init__.py").touch()
    process = lint(checkout)
    assert process.returncode == 1
    assert "stagesweep.attic" in process.stdout
    assert "stagesweep.sweep.attic" in process.stdout


def test_no_text_names_a_system_for_a_later_import() -> None:
    found = [
        f"{short(file)}:{node.lineno}"
        for file, tree in trees().items()
        if not file.is_relative_to(PACKAGE / "systems")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and "stagesweep.systems." in str(node.value)
    ]
    assert found == []


def private(name: str) -> bool:
    """One underscore at the start; none at the end, as the keys of Hydra have it (`_target_`)."""
    return bool(re.fullmatch(r"_[^_](.*[^_])?", name))


# A method of this name would override a private one.
UPSTREAM = {name for name in dir(nn.Module) if private(name) and callable(getattr(nn.Module, name))}


def defined(tree: ast.Module) -> set[str]:
    """Private names that a module defines, except those that override one of `nn.Module`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case ast.Attribute(ctx=ast.Store(), value=ast.Name("self" | "cls")):
                found.add(node.attr)
    return {name for name in found if private(name)} - UPSTREAM


def foreign(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines that use a private name that the module does not define, and the name."""
    own = defined(tree) | {"_replace", "_asdict", "_fields", "_make"}  # public: named tuples
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] != "stagesweep":
                for alias in node.names:
                    name = f"{module}.{alias.name}"
                    if any(map(private, name.split("."))):
                        yield node.lineno, name
            case ast.Import():
                for alias in node.names:
                    if any(map(private, alias.name.split("."))):
                        yield node.lineno, alias.name
            case ast.Attribute(value=ast.Name(module)) if module in sys.stdlib_module_names:
                pass
            case ast.Attribute(attr=name) if private(name) and name not in own:
                yield node.lineno, ast.unparse(node)
            case ast.Call(
                func=ast.Name("import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(str(name)), *_],
            ) if any(map(private, name.split("."))):
                yield node.lineno, name
            case ast.Call(
                func=ast.Name("getattr" | "setattr" | "hasattr" | "delattr"),
                args=[_, ast.Constant(str(name)), *_],
            ) if private(name) and name not in own:
                yield node.lineno, ast.unparse(node)
            case ast.FunctionDef(name=name) if name in UPSTREAM:
                yield node.lineno, name


def test_private_names_of_other_packages_are_used_in_one_file() -> None:
    found = [
        f"{short(file)}:{line}: {name}"
        for file, tree in trees().items()
        if file != COMPAT
        for line, name in foreign(tree)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "from hydra._internal.utils import get_args_parser",
        "from hydra_plugins.hydra_optuna_sweeper._impl import something",
        "from torch import _dynamo",
        "import optuna.storages._rdb",
        "study._storage.get_all_trials()",
        "self._cached_storage",
        "torch._C._cuda_init()",
        "getattr(study, '_storage')",
        "importlib.import_module('torch._dynamo')",
        "def _load_from_state_dict(self): ...",
    ],
)
def test_private_names_are_detected(line: str) -> None:
    assert list(foreign(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    ["from stagesweep.store.command import _parser", "self._parser = 1; other._parser",
     "point._replace(x=1)", "os._exit(0)", "node._target_", "type(x).__name__"],
)  # fmt: skip
def test_other_names_are_not_reported(line: str) -> None:
    assert not list(foreign(ast.parse(line)))


# ------------------------------------------------------------------------------ limits


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def functions(tree: ast.Module) -> dict[str, int]:
    """Every function and method, and its lines, decorators left out."""
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            found[node.name] = max(length, found.get(node.name, 0))
    return found


def test_the_core_has_at_most_1300_lines() -> None:
    assert sum(map(lines, (PACKAGE / "core").rglob("*.py"))) <= 1300


def test_the_fit_loop_has_at_most_60_lines() -> None:
    """The loop over epochs is the only `while` of its file."""
    file = PACKAGE / "core" / "fit.py"
    assert lines(file) <= 300
    every = [node for node in ast.walk(trees()[file]) if isinstance(node, ast.FunctionDef)]
    (loop,) = (f for f in every if any(isinstance(node, ast.While) for node in ast.walk(f)))
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 60


def test_functions_have_at_most_80_lines() -> None:
    long = {
        f"{short(file)}: {name}": length
        for file, tree in trees().items()
        for name, length in functions(tree).items()
        if length > 80
    }
    assert long == {}


# ------------------------------------------------------------------------------ packages


@pytest.mark.parametrize("package", [short(package) for package in PACKAGES])
def test_every_package_has_a_docstring(package: str) -> None:
    """In two to four sentences: what, what it may import, which file to read first."""
    said = ast.get_docstring(trees()[SRC / package / "__init__.py"]) or ""
    assert 2 <= len(re.findall(r"[.!?](?=\s|$)", said)) <= 4, said
