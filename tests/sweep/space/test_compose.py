import pickle
from collections.abc import Iterator, Sequence

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from stagesweep.config import register
from stagesweep.config.register import study_name
from stagesweep.sweep.engine import worker
from stagesweep.sweep.space.compose import (
    SweepContext,
    compose,
    compose_with_hydra,
    differences,
    sweep_context,
    with_example,
)
from stagesweep.sweep.space.grammar import parse
from stagesweep.sweep.space.overrides import quoted
from stagesweep.sweep.space.space import Space

FIRST = ["stage.joint.optimizer.lr=0.001", "stage.joint.epochs=3", "seed=1", "experiment=digits"]
FIXED = ["experiment=digits"]
EXAMPLES: dict[str, bytes] = {}  # to compose one takes long


@pytest.fixture(scope="module")
def work() -> SweepContext:
    register.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration(
            "config", [*FIXED, "hydra.sweep.dir=there", "search.study=s"], run_mode=RunMode.MULTIRUN
        )
    # Two fixtures of a module live at once, and Hydra can be initialised only once.
    context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
    return sweep_context(context, master, ("there", "task"))


def having(work: SweepContext, first: list[str]) -> SweepContext:
    """The work with an example, as it comes to another process."""
    master: DictConfig = pickle.loads(work.master)
    if (key := str(first)) not in EXAMPLES:
        EXAMPLES[key] = with_example(work.context, master, work.task, first)
    sent: SweepContext = pickle.loads(EXAMPLES[key])
    return sent


def plainly(work: SweepContext, overrides: list[str]) -> DictConfig:
    """What Hydra composes."""
    return compose_with_hydra(work.context, pickle.loads(work.master), overrides)


def text(config: DictConfig) -> str:
    """All of a config but the moment and the folder, which are not of the overrides."""
    return OmegaConf.to_yaml(config)


@pytest.mark.parametrize(
    ("first", "then", "quick"),
    [
        (FIRST, ["stage.joint.optimizer.lr=3e-4", *FIRST[1:]], True),
        (FIRST, FIRST, True),
        (["seed=1", *FIXED], ["seed=2", *FIXED], True),
        (["init_from=null", *FIXED], ["init_from='a b,c'", *FIXED], True),
        (["seed=1", *FIXED], ["seed=${stage.joint.epochs}", *FIXED], True),
        # Interpolations that only the trial can resolve.
        (["seed=${hydra:job.num}", *FIXED], ["seed=${hydra:job.num}", *FIXED], True),
        (["seed=${hydra:job.num}", *FIXED], ["seed=2", *FIXED], False),
        (
            ["seed=1", "init_from=${oc.env:UNSET}", *FIXED],
            ["seed=2", "init_from=${oc.env:UNSET}", *FIXED],
            True,
        ),
        # More than a value: another group, another key, a dict, a key that comes or goes.
        (["model=vae_base", *FIXED], ["model=vae_memory", *FIXED], False),
        (["seed=1", *FIXED], ["resume=never", *FIXED], False),
        (["seed=1", *FIXED], ["seed=1", "resume=never", *FIXED], False),
        (["+search.note=1", *FIXED], ["+search.note=2", *FIXED], False),
        (["stage.joint.loss={}", *FIXED], ["stage.joint.loss={kl:{weight:2}}", *FIXED], False),
        # The later of a key and one above it wins.
        (
            ["stage.joint.epochs=2", "stage.joint={epochs:5}", *FIXED],
            ["stage.joint.epochs=3", "stage.joint={epochs:5}", *FIXED],
            False,
        ),
        # Values of a group that is chosen come after it.
        (
            ["model.latent=4", "model=vae_base", *FIXED],
            ["model.latent=6", "model=vae_base", *FIXED],
            True,
        ),
    ],
)
def test_a_config_equals_that_of_hydra(
    work: SweepContext, first: list[str], then: list[str], quick: bool
) -> None:
    try:
        expected = plainly(work, then)
    except ConfigCompositionException as error:
        with pytest.raises(ConfigCompositionException, match=str(error).splitlines()[0]):
            compose(having(work, first), then)
        return
    ready = having(work, first)
    assert ready.like is not None
    assert (differences(ready.like, then) is not None) is quick
    made = compose(ready, then)
    assert (made is ready.like) is quick
    assert text(made) == text(expected)
    if not any("${hydra:" in each or "${oc.env" in each for each in then):  # it resolves them
        assert made.hydra.job.override_dirname == expected.hydra.job.override_dirname
    assert OmegaConf.get_type(made.stage.joint) is OmegaConf.get_type(expected.stage.joint)
    assert OmegaConf.is_struct(made)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rate=st.floats(1e-6, 1.0),
    epochs=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    path=st.text("ab c,=[]{}:/'\"\\$", max_size=12),
)
def test_any_value(work: SweepContext, rate: float, epochs: int, seed: int, path: str) -> None:
    then = [f"stage.joint.optimizer.lr={rate}", f"stage.joint.epochs={epochs}", f"seed={seed}"]
    first = [*FIRST[:3], "init_from=null", *FIXED]
    then += [f"init_from={quoted(path)}", *FIXED]
    ready = having(work, first)
    made = compose(ready, then)
    assert made is ready.like
    expected = plainly(work, then)
    assert text(made) == text(expected)


# ------------------------------------------------------------------------------ any text

BATCH = 25
GROUP = "{value: null, fit: {epochs: 3, lr: 0.1, sizes: [1, 2]}}"
SMALL = "\n".join(["search: {study: s}", "seed: 0", *(f"g{n}: {GROUP}" for n in range(BATCH))])
ODD = "a'b\"c,{d}=é&$x [y]"
WORDS = st.text("abü ñ日&=,:'\"\\[]{}()#;1.-", max_size=6).map(quoted)
NUMBERS = st.integers(-99, 99).map(str) | st.floats(-1e3, 1e3).map(repr)
PLAIN = [
    "word",
    "two words",
    "a\\,b",
    "a\\=b",
    "null",
    "true",
    "2.5e-7",
    "a/b.csv",
    '"it\'s"',
    "nan",
]
INTERPOLATIONS = [
    *("${seed}", "${.epochs}", "${..value}", "${hydra:job.num}", "${hydra:runtime.output_dir}"),
    *("${oc.env:ODD}", "'${oc.env:ODD} ü'", "'\\${seed}'", "${no.such}", "${hydra.job.num}"),
]
SINGLE = WORDS | NUMBERS | st.sampled_from(PLAIN) | st.sampled_from(INTERPOLATIONS)
LISTS = st.lists(SINGLE, max_size=3).map(lambda items: f"[{','.join(items)}]")
DICTS = st.dictionaries(st.sampled_from(["epochs", "lr"]), SINGLE | LISTS).map(
    lambda items: f"{{{','.join(f'{key}:{value}' for key, value in items.items())}}}"
)
# A key, and one or two values of it.
Line = tuple[str, list[str]]


def values(kinds: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(kinds, min_size=1, max_size=2, unique=True)


LINES = st.lists(
    st.tuples(st.sampled_from(["value", "fit.lr", "fit.sizes", "+new"]), values(SINGLE | LISTS))
    | st.tuples(st.sampled_from(["fit", "value", "+new"]), values(DICTS)),
    min_size=1,
    max_size=2,
    unique_by=lambda line: line[0],
)


@st.composite
def batches(draw: st.DrawFn) -> list[Line]:
    """25 command lines at once, each for a part of the config: to compose it takes long."""
    groups = [draw(LINES) for _ in range(BATCH)]
    named = [
        (f"{'+' * key.startswith('+')}g{n}.{key.lstrip('+')}", texts)
        for n, lines in enumerate(groups)
        for key, texts in lines
    ]
    return [*named, ("seed", ["1", "2"])]


def typed(lines: Sequence[Line]) -> list[str]:
    return [f"{key}={','.join(texts)}" for key, texts in lines]


def picked(lines: Sequence[Line], last: bool) -> list[str]:
    """The overrides of the first or of the last point, as a user types them for a single run."""
    return [f"{key}={texts[-1 if last else 0]}" for key, texts in lines]


def of_point(space: Space, last: bool) -> list[str]:
    """The overrides of the same point, as a trial gets them."""
    point = {each.name: each.values()[-1 if last else 0] for each in space.parameters}
    return space.arguments(space.overrides(point))


def seen_by_task(config: DictConfig) -> list[tuple[str, str]]:
    """What a task can see of each part of its config: as it is, and resolved."""
    found = []
    for name, part in config.items():
        try:
            resolved = repr(OmegaConf.to_container(part, resolve=True)) if name != "seed" else part
        except OmegaConfBaseException as error:
            resolved = str(error)
        found.append((str(OmegaConf.to_container(config)[name]), resolved))
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SweepContext]:
    """A sweep over a small config, whose trials return what they see of it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.yaml").write_text(SMALL)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration(
            "config", [f"hydra.sweep.dir={folder}", "hydra.output_subdir=null"], RunMode.MULTIRUN
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ODD", ODD)
        patch.setattr(worker, "configure_log", lambda *_: None)
        patch.setattr(worker, "load_task", lambda _: seen_by_task)
        context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
        yield sweep_context(context, master, ("there", "task"))
    HydraConfig.instance().cfg = None


def by_hydra(small: SweepContext, lines: list[str]) -> list[tuple[str, str]]:
    """What a task sees of the config that Hydra composes of these overrides."""
    config = plainly(small, lines)
    with open_dict(config):
        config.hydra.job.update(num=7, id="7")
        config.hydra.runtime.output_dir = str(small.folder / "7")
        HydraConfig.instance().cfg = config.copy()
        del config["hydra"]
    return seen_by_task(config)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=batches())
def test_a_trial_gets_what_hydra_makes_of_any_text(small: SweepContext, lines: list[Line]) -> None:
    """20 times 25 command lines: 500 in all."""
    space = parse({}, typed(lines))
    expected = by_hydra(small, picked(lines, last=True))
    assert worker.run_task(small, 7, "7", of_point(space, last=True)) == expected
    for key, texts in lines:
        assert len({study_name("grid", [f"{key}={text}"]) for text in texts}) == len(texts)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=LINES, data=st.data())
def test_other_results_have_another_study(
    small: SweepContext, lines: list[Line], data: st.DataObject
) -> None:
    """In another order, the same overrides have the same name, and may give other results."""
    lines = [(f"{'+' * key.startswith('+')}g0.{key.lstrip('+')}", texts) for key, texts in lines]
    other = data.draw(st.permutations(lines))
    one, two = parse({}, typed(lines)), parse({}, typed(other))
    assert study_name("grid", typed(lines)) == study_name("grid", typed(other))
    if other != lines and one.fingerprint() == two.fingerprint():
        for last in (False, True):
            assert by_hydra(small, of_point(one, last)) == by_hydra(small, of_point(two, last))


def test_a_wrong_value_is_refused(work: SweepContext) -> None:
    wrong = ["stage.joint.optimizer.lr=fast", *FIRST[1:]]
    with pytest.raises(ConfigCompositionException) as there:
        plainly(work, wrong)
    with pytest.raises(ConfigCompositionException) as here:
        compose(having(work, FIRST), wrong)
    assert str(here.value) == str(there.value)
    assert str(here.value.__cause__) == str(there.value.__cause__)
