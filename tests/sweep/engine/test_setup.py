from types import SimpleNamespace
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from stagesweep.config import register
from stagesweep.sweep.engine.setup import validate_sweep
from stagesweep.sweep.space.grammar import parse


def test_a_key_without_a_value_of_its_own_can_be_swept() -> None:
    given = ["experiment=audiogram", "data.path=a.csv,b.csv"]
    register.register()
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        try:
            launcher: Any = SimpleNamespace()
            validate_sweep(config, parse({}, given), launcher, launcher)
        finally:
            HydraConfig.instance().cfg = None
