import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from stagesweep.config import register
from stagesweep.config.nodes import as_typed


def composed_name(*overrides: str) -> str:
    """The name of the study of a command, as Hydra composes it."""
    register.register()
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", list(overrides), run_mode=RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        try:
            assert as_typed(config.hydra.overrides.task) == list(overrides)
            return str(config.search.study)
        finally:
            HydraConfig.instance().cfg = None


def test_the_name_of_a_study_does_not_change() -> None:
    given = ("experiment=digits", "search=bayes", "search.n_trials=12", "stage.figures.umap=false")
    assert composed_name(*given) == "bayes_c6cd7eac"


@pytest.mark.parametrize(
    "value",
    [
        "${stage.joint.optimizer.lr}",
        "${..epochs}",
        "${hydra:job.num}",
        "${hydra.job.num}",
        "${hydra:runtime.choices.model}",
        "${oc.env:UNSET}",
        "${stage.no_such}",
    ],
)
def test_an_interpolation_is_hashed_as_it_was_typed(value: str) -> None:
    swept = "stage.joint.optimizer.lr=1e-4,1e-3"
    given = f"stage.pretrain.optimizer.lr={value}"
    assert composed_name(swept, given) == register.study_name("grid", [swept, given])
