"""The documentation is correct: commands compose, code runs, file trees and links exist."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from stagesweep.config import register, schema
from stagesweep.config.validation import validate
from stagesweep.store import command
from stagesweep.sweep.report.page import _parser

Compose = Callable[..., DictConfig]

ROOT = Path(__file__).parents[1]
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("multirun/*.md")])
]
GUIDE = (ROOT / "docs/guide.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands of other programs, which are not checked.
FOREIGN = {"eval", "export", "git", "pip", "python3.11", "source"}
FOREIGN |= {"optuna-dashboard", "tensorboard"}


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(text(page)) if kind == language]


def files(page: str) -> dict[str, str]:
    """Code blocks that begin with a comment naming their file: path -> content."""
    found = {}
    for _, body in BLOCK.findall(text(page)):
        head, _, rest = body.partition("\n")
        if re.fullmatch(r"# \S+/\S+\.(py|yaml|md)", head):
            found[head.removeprefix("# ")] = rest
    return found


def write_files(page: str, folder: Path) -> None:
    for name, content in files(page).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def commands(page: str) -> list[list[str]]:
    """Every command of the page's bash blocks, as words, without variables set before it."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in map(without_environment, found) if words]


def without_environment(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def of(name: str) -> list[tuple[str, list[str]]]:
    """The commands of one program, and the page each is on."""
    return [(page, words[1:]) for page, words in COMMANDS if words[0] == name]


def values(words: list[str]) -> dict[str, str] | None:
    """The overrides of a command by key; None if it does more than set values."""
    own = [word for word in words if word != "-m"]
    if not all(re.match(r"(seed|resume|experiment|\w+\.[\w.]+)=", word) for word in own):
        return None
    return {"experiment": "experiment=digits"} | {word.partition("=")[0]: word for word in own}


def batches() -> list[Any]:
    """The commands to compose: those that set values of different keys together, to save time."""
    merged: list[dict[str, str]] = []
    found: dict[str, Any] = {}
    for page, words in of("stagesweep"):
        if (own := values(words)) is None:
            found[shlex.join(words)] = (page, words)
        elif room := [m for m in merged if all(m.get(key, w) == w for key, w in own.items())]:
            room[0].update(own)
        else:
            merged.append(own)
    found |= {shlex.join(each.values()): ("README.md", [*each.values()]) for each in merged}
    return [pytest.param(*each, id=name) for name, each in found.items()]


# ------------------------------------------------------------------------------ commands


def test_every_documented_command_is_checked() -> None:
    known = {"stagesweep", "stagesweep-report", "stagesweep-store", "make", *FOREIGN}
    assert [words for _, words in COMMANDS if words[0] not in known] == []


def test_commands_that_sweep_have_the_multirun_flag() -> None:
    for _, words in of("stagesweep"):
        flags, overrides = parse(words)
        assert flags.multirun or not any(o.is_sweep_override() for o in overrides), words


@pytest.mark.parametrize(("page", "words"), batches())
def test_a_command_composes_and_validates(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page: str, words: list[str]
) -> None:
    """A sweep: with the last value of every key."""
    flags, overrides = parse(words)
    monkeypatch.chdir(tmp_path)
    write_files(page, tmp_path)
    if flags.help or flags.info or flags.config_dir == "conf":  # the package: tested below
        return
    folders = [tmp_path / flags.config_dir] if flags.config_dir else []
    for override in overrides:
        if override.key_or_group in ("data.path", "init_from"):
            value = OverridesParser.create().parse_override(point(override)).value()
            place = tmp_path / str(value)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
    cfg = compose(*map(point, overrides), folders=folders)
    if flags.package:
        assert OmegaConf.select(cfg, flags.package) is not None
    elif not flags.cfg:
        validate(cfg)


def parse(words: list[str]) -> tuple[Any, list[Override]]:
    """Hydra's own flags, and the overrides; flags may come after overrides."""
    flags, rest = get_args_parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    return flags, OverridesParser.create().parse_overrides([*flags.overrides, *rest])


def point(override: Override) -> str:
    """The override itself, or with the last value that it sweeps."""
    if not override.is_sweep_override():
        assert override.input_line is not None
        return override.input_line
    if override.is_interval_sweep():
        interval: Any = override.value()
        return f"{override.key_or_group}={interval.end}"
    *_, last = override.sweep_string_iterator()
    return f"{override.key_or_group}={last}"


def test_store_commands_are_parsed() -> None:
    for _, words in of("stagesweep-store"):
        assert command._parser().parse_args(words).run


def test_report_commands_are_parsed() -> None:
    for _, words in of("stagesweep-report"):
        assert _parser().parse_args(words).folders


def test_every_documented_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE))
    named = {words[1] for _, words in COMMANDS if words[0] == "make"}
    named |= {name for page in PAGES for name in re.findall(r"`make (\w+)`", text(page))}
    assert named
    assert named <= targets


# ------------------------------------------------------------------------------ worked examples


def test_the_package_of_the_guide_runs(tmp_path: Path, warm: Any) -> None:
    write_files("docs/guide.md", tmp_path)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "STAGESWEEP_TRUST": "mylab"}
    (words,) = (w[1:] for _, w in COMMANDS if w[1:] == ["--config-dir=conf", "experiment=tumours"])
    process = warm.run([*words, "hydra.run.dir=run"], tmp_path, own)
    assert process.returncode == 0, process.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["objective"]["name"] == "train/val_accuracy"
    assert result["objective"]["value"] > 0.9


def with_rows(guide: str, rows: list[str]) -> str:
    """The guide with rows below the headers of its tables that come before them."""
    lines = guide.splitlines(keepends=True)
    place = 0
    for row in rows:
        if row in lines:
            place = lines.index(row) + 2
        else:
            lines.insert(place, row)
    return "".join(lines)


@pytest.fixture(scope="module")
def contributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the examples of CONTRIBUTING.md, which replace no file."""
    folder = tmp_path_factory.mktemp("contributed")
    for name in ("conf", "docs", "src", "tests"):
        shutil.copytree(ROOT / name, folder / name)  # with its bytecode, which takes long to make
    for file in (*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"):
        shutil.copy(file, folder)
    before = {path for path in folder.rglob("*") if path.is_file()}
    assert not before & {folder / name for name in files("CONTRIBUTING.md")}
    write_files("CONTRIBUTING.md", folder)
    return folder


def python(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in a copy of the checkout, on its package."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_system_of_contributing_runs(contributed: Path) -> None:
    """With the real command, and no edit elsewhere."""
    process = python(contributed, "-m", "stagesweep", "experiment=wine", "hydra.run.dir=run")
    assert process.returncode == 0, process.stderr
    result = json.loads((contributed / "run" / "result.json").read_text())
    assert result["objective"]["name"] == "train/val_neighbour"
    assert result["objective"]["value"] >= 0.9


def test_the_examples_of_contributing_keep_the_import_rules(contributed: Path) -> None:
    script = Path(sys.executable).with_name("lint-imports")
    process = python(contributed, str(script), "--no-cache", "--no-logo")
    assert process.returncode == 0, process.stdout


def test_the_examples_of_contributing_pass_all_tests(contributed: Path) -> None:
    """The tests of the examples, and those that find every YAML, package and page."""
    (rows,) = (body for body in blocks("CONTRIBUTING.md", "markdown") if body[:1] == "|")
    (contributed / "docs/guide.md").write_text(with_rows(GUIDE, rows.splitlines(keepends=True)))
    own = "wine or linear or sparsity or embed or laptop or reached"
    places = [name for name in files("CONTRIBUTING.md") if name.startswith("tests/")]
    assert {Path(name).parent.name for name in places} == {"wine", "stage"}
    places += [f"tests/test_{name}.py" for name in ("conf", "conf_headers", "docs", "rules")]
    process = python(contributed, "-m", "pytest", "-q", "-k", own, *places)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_valid(page: str) -> None:
    for body in blocks(page, "python"):
        assert ast.parse(body).body


# ------------------------------------------------------------------------------ trees and links


def entries(folder: Path) -> set[str]:
    """The visible entries of a folder that git does not ignore; folders end with a slash."""
    ignored = [line.strip("/") for line in text(".gitignore").splitlines() if line[:1] != "#"]
    found = {path.name + "/" * path.is_dir() for path in folder.glob("[!.]*")}
    return {name for name in found if not any(fnmatch(name.strip("/"), each) for each in ignored)}


def tree(heading: str) -> dict[str, list[str]]:
    """A tree drawn below a heading of the README: its entries, and those inside each folder."""
    _, body = BLOCK.findall(text("README.md").partition(f"\n{heading}\n")[2])[0]
    found: dict[str, list[str]] = {}
    for line in body.splitlines():
        indent, names = re.match(r"( *)([^\s,]+(?:, [^\s,]+)*)", line).groups()  # type: ignore[union-attr]
        if indent:
            found[list(found)[-1]] += names.split(", ")
        else:
            found |= {name: [] for name in names.split(", ")}
    return found


def test_the_tree_in_the_readme_matches_the_disk() -> None:
    drawn = tree("## Repository")
    assert [name for name in drawn if not (ROOT / name).exists()] == []
    top = {name.partition("/")[0] + "/" * ("/" in name) for name in drawn}
    assert {name for name in top if not name.startswith(".")} == entries(ROOT)
    for name, inside in drawn.items():
        if inside:
            assert set(inside) == entries(ROOT / name) - {"__init__.py"}, name
    assert drawn["src/stagesweep/"]
    assert drawn["conf/"]


ARCHITECTURE = text("docs/architecture.md")
SOURCE = ROOT / "src" / "stagesweep"


def drawn_map() -> list[str]:
    """The paths of the architecture's map, below src/stagesweep; packages end with a slash."""
    _, body = BLOCK.findall(ARCHITECTURE.partition("\n## The map\n")[2])[0]
    head, *lines = body.splitlines()
    assert head == "src/stagesweep/"
    found, above = [], [""]
    for line in lines:
        indent, name = re.match(r"((?:  )+)(\S+) +\S", line).groups()  # type: ignore[union-attr]
        above = above[: len(indent) // 2]
        found.append(above[-1] + name)
        above.append(above[-1] + name)
    return found


def test_the_map_names_every_package() -> None:
    """A system may have a line. It need not, so that a new system needs no edit here."""
    packages = {f"{file.parent.relative_to(SOURCE)}/" for file in SOURCE.rglob("__init__.py")}
    drawn = drawn_map()
    assert len(drawn) == len(set(drawn))
    framework = {name for name in packages if not re.match(r"\./|systems/.", name)}
    assert framework == {name for name in drawn if re.fullmatch(r"(?!systems/.).*/", name)}
    assert [name for name in drawn if not (SOURCE / name).exists()] == []


def test_the_map_follows_the_order_of_the_import_rules() -> None:
    rules = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = {rule["id"]: rule["layers"] for rule in rules if rule["type"] == "layers"}
    names = [name.removesuffix(".py").strip("/") for name in drawn_map()]
    top = [each for layer in layers["layers"] for each in layer.split(" | ")]
    assert [name for name in names if "/" not in name] == top
    inside = [name.partition("/")[2] for name in names if name.startswith("sweep/")]
    assert inside == layers["sweep"]


def defined(file: Path) -> set[str]:
    """Functions, classes and methods (`Class.method`) of a module."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            names = (each.name for each in members if isinstance(each, ast.FunctionDef))
            found |= {f"{node.name}.{name}" for name in names}
    return found


def test_files_and_functions_named_by_the_architecture_exist() -> None:
    quoted = re.findall(r"`([^`]+)`", BLOCK.sub("", ARCHITECTURE))
    files = [each for each in quoted if re.fullmatch(r"[\w/]+\.py(: [\w.]+)?", each)]
    folders = [each for each in quoted if each.startswith("conf/")]
    assert len(files) > 30
    assert folders
    wrong = [each for each in folders if not (ROOT / each).is_dir()]
    for each in files:
        place, _, name = each.partition(": ")
        file = SOURCE / place
        if not file.is_file() or (name and name not in defined(file)):
            wrong.append(each)
    assert wrong == []


@pytest.mark.parametrize("heading", ["The way of a run", "The way of a trial"])
def test_each_walkthrough_has_at_most_twelve_steps_with_file_and_function(heading: str) -> None:
    body = ARCHITECTURE.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    steps = re.split(r"^\d+\. ", body, flags=re.MULTILINE)[1:]
    assert 6 <= len(steps) <= 12
    assert [step for step in steps if not re.search(r"`\S+\.py: \S+`", step)] == []


def anchors(page: str) -> set[str]:
    """The anchor of a heading."""
    prose = BLOCK.sub("", text(page))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_has_a_target(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text(page))):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.resolve().relative_to(ROOT).as_posix()), link


# ------------------------------------------------------------------------------ completeness


def options() -> list[str]:
    """``group/option`` of every group that the guide has a table of."""
    groups = ("model", "data", "loss", "stage", "hardware", "search")
    return [
        f"{g}/{file.stem}" for g in groups for file in sorted((ROOT / "conf" / g).glob("*.yaml"))
    ]


@pytest.mark.parametrize("option", options())
def test_every_option_has_a_row(option: str) -> None:
    """In the guide or on the page of its system."""
    group, _, name = option.partition("/")
    docs = "\n\n".join(text(page) for page in PAGES if page.startswith("docs/"))
    tables = re.findall(rf"^\| {group} \|.*?(?=\n\n|\Z)", docs, re.MULTILINE | re.DOTALL)
    assert re.search(rf"^\| [^|]*`{name}`.* \|", "\n".join(tables), re.MULTILINE)


def schema_keys() -> list[str]:
    register.register()
    repo = ConfigStore.instance().repo
    kinds = [
        OmegaConf.get_type(node.node)
        for group in ("stage", "hardware")
        for name, node in repo[group].items()
        if name.startswith("base_")
    ]
    kinds += [schema.Optimizer, schema.Schedule, schema.EarlyStop, schema.Weight, schema.Search]
    return sorted({field.name for kind in kinds for field in fields(kind)})  # type: ignore[arg-type]


@pytest.mark.parametrize("key", schema_keys())
def test_every_key_of_a_schema_is_explained(key: str) -> None:
    assert re.search(rf"`[^`\n]*\b{key}\b[^`\n]*`", GUIDE)


@pytest.mark.parametrize("page", PAGES)
def test_prose_lines_are_at_most_100_columns(page: str) -> None:
    prose = BLOCK.sub("", text(page)).splitlines()
    assert [line for line in prose if len(line) > 100 and not line.startswith("|")] == []
