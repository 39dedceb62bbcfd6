import pickle
from collections.abc import Iterator

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from stagesweep.config import register
from stagesweep.sweep.space.compose import (
    SweepContext,
    compose,
    compose_with_hydra,
    differences,
    sweep_context,
    with_example,
)

FIRST = ["stage.joint.optimizer.lr=0.001", "stage.joint.epochs=3", "seed=1", "experiment=digits"]
FIXED = ["experiment=digits"]
EXAMPLES: dict[str, bytes] = {}


@pytest.fixture(scope="module")
def work() -> Iterator[SweepContext]:
    register.register()
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration(
            "config", [*FIXED, "hydra.sweep.dir=there", "search.study=s"], run_mode=RunMode.MULTIRUN
        )
        context = HydraContext(config_loader=loader, callbacks=None)  # type: ignore[arg-type]
        yield sweep_context(context, master, ("there", "task"))


def having(work: SweepContext, first: list[str]) -> SweepContext:
    """The work with an example, as it comes to another process."""
    master: DictConfig = pickle.loads(work.master)
    sent: SweepContext = pickle.loads(with_example(work.context, master, work.task, first))
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


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rate=st.floats(1e-6, 1.0),
    epochs=st.integers(1, 1000),
    seed=st.integers(0, 2**31),
    path=st.text("ab c,=[]{}:/'\"\\$", max_size=6),
)
def test_any_value(work: SweepContext, rate: float, epochs: int, seed: int, path: str) -> None:
    quoted = "'" + path.replace("\\", "").replace("'", "").replace("$", "") + "'"
    then = [f"stage.joint.optimizer.lr={rate}", f"stage.joint.epochs={epochs}", f"seed={seed}"]
    first = [*FIRST[:3], "init_from=null", *FIXED]
    then += [f"init_from={quoted}", *FIXED]
    ready = having(work, first)
    made = compose(ready, then)
    assert made is ready.like
    expected = plainly(work, then)
    assert text(made) == text(expected)


def test_a_wrong_value_is_refused(work: SweepContext) -> None:
    wrong = ["stage.joint.optimizer.lr=fast", *FIRST[1:]]
    with pytest.raises(ConfigCompositionException) as there:
        plainly(work, wrong)
    with pytest.raises(ConfigCompositionException) as here:
        compose(having(work, FIRST), wrong)
    assert str(here.value) == str(there.value)
    assert str(here.value.__cause__) == str(there.value.__cause__)
