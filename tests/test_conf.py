"""Every YAML in conf/ composes, validates and binds; the files are discovered, not listed."""

import inspect
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import execution_whitelist, instantiate
from omegaconf import DictConfig, OmegaConf
from optuna.pruners import BasePruner

import stagesweep
from stagesweep.config import register, schema, trust
from stagesweep.config.nodes import target_nodes as nodes
from stagesweep.config.signatures import SPECIAL, bind, locate
from stagesweep.config.validation import validate
from stagesweep.store.fingerprint import sources
from stagesweep.sweep.space.grammar import parse

Compose = Callable[..., DictConfig]

CONF = register.folder()
SRC = Path(stagesweep.__file__).parent
# Groups that build no component.
NO_COMPONENTS = ("experiment", "search", "hydra")
# Arguments that the framework supplies.
SUPPLIED = {"model": ("spec",)}


def options(*groups: str) -> list[str]:
    """``group/option`` of every YAML in conf/, or in some of its groups."""
    found = (file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.rglob("*/*.yaml"))
    return sorted(name for name in found if not groups or name.partition("/")[0] in groups)


def groups() -> list[str]:
    """Groups whose options build a component."""
    return sorted({name.partition("/")[0] for name in options()} - set(NO_COMPONENTS))


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return found


def components() -> dict[str, dict[str, Any]]:
    """Every `_target_` node in the YAML of a component."""
    found = ((name, path, node) for name in options(*groups()) for path, node in nodes(read(name)))
    return {f"{name}:{path}".rstrip(":"): node for name, path, node in found}


def base(name: str) -> str | None:
    """The schema that a YAML extends, or None."""
    defaults = map(str, read(name).get("defaults", ()))
    return next((each for each in defaults if each.startswith("base_")), None)


def extends(name: str) -> str:
    """The YAML of its group that a YAML is based on, through all defaults."""
    group, first = name.partition("/")[0], read(name).get("defaults", ["_self_"])[0]
    return extends(f"{group}/{first}") if f"{group}/{first}" in options(group) else name


COMPONENTS = components()
# Files that extend a schema themselves, and so list every field.
SCHEMAS = [name for name in options("stage", "hardware") if base(name) is not None]


def given(cfg: DictConfig, folder: Path) -> DictConfig:
    """The config with values for its missing keys."""
    file = folder / "given.csv"
    file.touch()
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, str(file) if key.endswith("path") else "image")
    return cfg


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_validates(
    compose: Compose, tmp_path: Path, name: str
) -> None:
    option = name.partition("/")[2]
    cfg = given(compose(f"experiment={option}"), tmp_path)
    validate(cfg)  # raises at the first fault
    stage, _, metric = str(cfg.objective.metric).partition("/")
    assert stage in cfg.stage
    assert metric


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_header_has_command_time_and_result(name: str) -> None:
    """The header has the command, how long it takes on which machine, and what to expect."""
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    option = name.partition("/")[2]
    command = "stagesweep" if option == "digits" else f"experiment={option}"
    assert command in header
    assert re.search(r"\d+ ?(s|seconds?|min|minutes?)\b", header), "expected time"


# Profiles of several cards are composed below.
PROFILES = [name for name in options("hardware") if not re.search(r"_x\d", name)]


# Models of one part: stages name a part of the others.
MODELS = [name for name in options("model") if "_target_" in read(name)]


@pytest.mark.parametrize("name", [*MODELS, *PROFILES])
def test_every_model_and_profile_fits_the_default_experiment(compose: Compose, name: str) -> None:
    group, _, option = name.partition("/")
    cfg = compose(f"{group}={option}")
    validate(cfg)  # raises at the first fault
    assert cfg.experiment == "digits"


@pytest.mark.parametrize("name", options("data", "loss"))
def test_every_data_set_and_loss_binds(compose: Compose, tmp_path: Path, name: str) -> None:
    group, _, option = name.partition("/")
    choice = f"data={option}" if group == "data" else f"+loss@loss.this={option}"
    cfg = given(compose("experiment=tiny", choice), tmp_path)
    plain = OmegaConf.to_container(cfg.data if group == "data" else cfg.loss.this)
    bound = list(nodes(plain, group))
    assert bound
    for path, node in bound:
        bind(path, node)


@pytest.mark.parametrize("name", options("stage"))
def test_every_stage_composes_and_validates(compose: Compose, tmp_path: Path, name: str) -> None:
    option = name.partition("/")[2]
    trains = issubclass(locate(name, read(name)["_target_"]), schema.Fit)  # type: ignore[arg-type]
    extra = ["+stage.this.loss={kl: {weight: 1}}", "stage.this.epochs=1"] if trains else []
    cfg = given(compose("experiment=tiny", f"+stage@stage.this={option}", *extra), tmp_path)
    validate(cfg)  # raises at the first fault


def of_search(part: str) -> list[str]:
    """Options of a group within ``search``."""
    return [Path(name).name for name in options("search") if f"/{part}/" in name]


METHODS = [name.partition("/")[2] for name in options("search") if name.count("/") == 1]
EXPERIMENTS = [name.partition("/")[2] for name in options("experiment")]
SPACES = of_search("space")


@pytest.mark.parametrize("method", METHODS)
def test_every_search_composes(compose: Compose, method: str) -> None:
    assert compose("experiment=tiny", f"search={method}").search.n_trials > 0


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("method", METHODS)
def test_every_sampler_is_made(compose: Compose, method: str) -> None:
    cfg = compose("experiment=tiny", f"search={method}")
    node = HydraConfig.get().sweeper.sampler
    with execution_whitelist((*trust.trusted(), "hydra_plugins.*")):
        sampler = instantiate(node)
    sampler = sampler({"k": [1, 2]}) if node.get("_partial_") else sampler
    assert sampler.__class__.__module__.startswith("optuna.samplers")
    # A grid is taken in order.
    assert node.seed == (None if node.get("_partial_") else cfg.search.seed)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", of_search("pruner"))
def test_every_pruner_is_made_and_lists_every_parameter(compose: Compose, name: str) -> None:
    node = compose("experiment=tiny", f"search/pruner={name}").search.pruner
    if name == "none":
        assert node is None
        return
    wanted = inspect.signature(locate("search.pruner", node["_target_"])).parameters
    assert set(wanted) == set(node) - set(SPECIAL)
    for key, parameter in wanted.items():
        assert parameter.default in (node[key], inspect.Parameter.empty)
    with execution_whitelist(trust.trusted()):
        assert isinstance(instantiate(node), BasePruner)


@pytest.mark.parametrize("experiment", sorted(set(of_search("ablation")) - {"none"}))
def test_every_variant_of_an_ablation_composes(
    compose: Compose, tmp_path: Path, experiment: str
) -> None:
    cfg = compose(f"experiment={experiment}", "search=ablation")
    ablation = cfg.search.ablation
    space = parse({}, [], variants=ablation.variants, leave_one_out=ablation.leave_one_out)
    points = list(space.points(100))
    assert len(points) > 1
    assert {metric.partition("/")[0] for metric in ablation.metrics} <= set(cfg.stage)
    apply = ConfigLoaderImpl._apply_overrides_to_config
    groups = HydraConfig.get().runtime.choices
    parser = OverridesParser.create()
    for point in points:
        overrides = parser.parse_overrides(space.overrides(point))
        if any(each.key_or_group in groups for each in overrides):
            variant = compose(f"experiment={experiment}", *space.overrides(point))
        else:  # values only: as Hydra does after it has merged the files
            variant = deepcopy(cfg)
            apply(overrides, variant)
        validate(given(variant, tmp_path))


@pytest.mark.parametrize("space", sorted(set(SPACES) - {"none"}))
def test_every_key_of_a_search_space_exists(compose: Compose, tmp_path: Path, space: str) -> None:
    """A space is named after its experiment, perhaps with a suffix: ``digits_grid``."""
    experiment = max((e for e in EXPERIMENTS if f"{space}_".startswith(f"{e}_")), key=len)
    cfg = given(compose(f"experiment={experiment}", f"search/space={space}"), tmp_path)
    assert cfg.search.space
    for key, text in cfg.search.space.items():
        assert OmegaConf.select(cfg, key, throw_on_missing=True) is not None, key
        assert OverridesParser.create().parse_override(f"{key}={text}").is_sweep_override(), key


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_search_finds_the_space_of_the_experiment(compose: Compose, experiment: str) -> None:
    assert compose(f"experiment={experiment}", "search=bayes").search.space


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"grid", "ablation"}))
def test_a_method_searches_the_space_of_the_experiment(compose: Compose, method: str) -> None:
    assert compose("experiment=tiny", f"search={method}").search.space


# Packages whose classes a config may name, besides one system at a time.
SHARED = ("data", "model", "loss", "stage", "metric")
SYSTEMS = sorted(file.parent.name for file in (SRC / "systems").glob("*/__init__.py"))
LIBRARIES = ("torch.", "sklearn.", "optuna.")


def targets(value: Any) -> set[str]:
    """Every `_target_` in plain nested values."""
    return {node["_target_"] for _, node in nodes(value)}


def system(target: str) -> str | None:
    """The system a `_target_` belongs to; None for a shared part or a library.

    A target in any other package fails the test.
    """
    if target.startswith(LIBRARIES):
        return None
    package, _, rest = target.removeprefix("stagesweep.").partition(".")
    if package == "systems":
        assert rest.partition(".")[0] in SYSTEMS, f"{target}: no such system"
        return rest.partition(".")[0]
    assert package in SHARED, f"{target}: neither in a shared package nor in a system"
    assert target.startswith("stagesweep."), target
    return None


@pytest.mark.parametrize("name", [n for n in options() if not n.startswith("hydra/")])
def test_every_target_lies_in_a_shared_package_or_in_one_system(name: str) -> None:
    assert len({system(target) for target in targets(read(name))} - {None}) <= 1


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_mixes_no_two_systems(compose: Compose, tmp_path: Path, name: str) -> None:
    cfg = given(compose(f"experiment={name.partition('/')[2]}"), tmp_path)
    found = targets(OmegaConf.to_container(cfg, resolve=True))
    assert len({system(target) for target in found} - {None}) <= 1, sorted(found)


def test_a_target_in_another_package_is_refused() -> None:
    assert system("stagesweep.loss.kl.KL") is system("torch.optim.SGD") is None
    assert system(f"stagesweep.systems.{SYSTEMS[0]}.data.Some") == SYSTEMS[0]
    for target in ("stagesweep.core.fit.Loop", "stagesweep.systems.none.X", "loss.kl.KL"):
        with pytest.raises(AssertionError, match=target):
            system(target)


@pytest.mark.parametrize(
    "name", [n for n in COMPONENTS if extends(n.partition(":")[0]) not in SCHEMAS]
)
def test_a_component_lists_every_parameter(name: str) -> None:
    group, node = name.partition("/")[0], COMPONENTS[name]
    wanted = dict(inspect.signature(locate(name, node["_target_"])).parameters)
    for key in SUPPLIED.get(group, ()):
        wanted.pop(key)
    assert set(wanted) == set(node) - set(SPECIAL)


@pytest.mark.parametrize("name", options("stage", "hardware"))
def test_a_yaml_with_a_schema_extends_it(name: str) -> None:
    """Every profile, and the stages whose class inherits one."""
    target = read(name).get("_target_")
    has = target is None or issubclass(locate(name, target), schema.Stage)  # type: ignore[arg-type]
    assert (extends(name) in SCHEMAS) == has


CARDS = [name.partition("/")[2] for name in options("hardware") if name.endswith("gb")]


@pytest.mark.parametrize("card", CARDS)
def test_profiles_of_several_gpus_extend_that_of_one(card: str) -> None:
    def composed(name: str) -> dict[str, Any]:
        with initialize_config_dir(str(CONF)):
            found: dict[str, Any] = OmegaConf.to_object(hydra_compose(f"hardware/{name}"))  # type: ignore[assignment]
        return vars(found["hardware"])

    register.register()
    one = composed(card)
    assert one["min_memory_gb"] == int(card.rpartition("_")[2].removesuffix("gb"))
    assert (one["devices"], one["nodes"], one["precision"]) == (1, 1, schema.Precision.bf16)
    several = [f"{card}_x{n}" for n in (2, 4, 8)]
    for name in [*several, f"{card}_x4_2nodes", f"{card}_x8_2nodes"]:
        assert len(read(f"hardware/{name}")) == 2, "defaults, and the one thing that differs"
        devices = int(name.removesuffix("_2nodes").rpartition("x")[2])
        nodes = 2 if name.endswith("_2nodes") else 1
        assert composed(name) == one | {"devices": devices, "nodes": nodes}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_of_a_schema_is_shown_with_its_default(name: str) -> None:
    register.register()
    group, _, option = name.partition("/")
    schema = ConfigStore.instance().load(f"{group}/{base(name)}.yaml").node
    kind = OmegaConf.get_type(schema)
    assert kind is not None
    shown = {key: value for key, value in read(name).items() if key != "defaults"}
    assert list(shown) == [field.name for field in fields(kind)]
    if option == "auto" or base(name) == f"base_{option}":
        merged = OmegaConf.merge(schema, shown)
        assert OmegaConf.to_container(merged) == OmegaConf.to_container(schema)


# A part for data sets that do not fit in memory.
FOR_OTHERS = {"stagesweep.data.loader"}


@pytest.mark.parametrize("package", [*SHARED, *(f"systems.{name}" for name in SYSTEMS)])
def test_every_module_is_used_by_a_yaml_or_the_framework(package: str) -> None:
    """Each module is the `_target_` of a YAML, or is imported by one, or by the framework."""
    every = {target.rpartition(".")[0] for name in options() for target in targets(read(name))}
    reached = sources([*sorted(every), "stagesweep.run.context", "stagesweep.sweep.report"])
    files = (SRC / package.replace(".", "/")).rglob("*.py")
    modules = {".".join(file.relative_to(SRC.parent).with_suffix("").parts) for file in files}
    modules = {name for name in modules if not name.endswith("__init__")}
    assert modules
    assert modules - set(reached) <= FOR_OTHERS


PUBLIC_KEYS = [
    "experiment",
    "seed",
    "resume",
    "init_from",
    "objective.metric",
    "objective.mode",
    "search.n_trials",
    "stage.joint.epochs",
    "stage.joint.optimizer.lr",
    "hardware.devices",
    "hardware.precision",
    "hardware.micro_batch",
]


def test_public_keys_exist(compose: Compose) -> None:
    cfg = compose("experiment=tiny")
    for key in PUBLIC_KEYS:
        parent, _, name = key.rpartition(".")
        assert name in (OmegaConf.select(cfg, parent) if parent else cfg), key


def test_public_names_exist(compose: Compose) -> None:
    assert {"search/grid", "search/random", "search/bayes", "search/ablation"} <= set(options())
    assert {"experiment/digits", "experiment/audiogram"} <= set(options())
    assert {"hardware/auto", "hardware/cpu"} <= set(options())
    assert {"rtx5090_32gb", "a100_40gb", "a100_80gb", "h100_80gb", "h200_141gb"} <= set(CARDS)
    assert "path" in list(compose("experiment=audiogram").data)
    root = Path(__file__).parents[1]
    scripts = re.findall(r'^(stagesweep\S*) = "', (root / "pyproject.toml").read_text(), re.M)
    assert {"stagesweep", "stagesweep-store"} <= set(scripts)
    assert "STAGESWEEP_STORE" in (SRC / "store" / "store.py").read_text()
