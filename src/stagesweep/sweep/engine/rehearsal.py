"""Rehearses a trial in a process that trials are forked from, so that its caches are filled."""

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from stagesweep.config import register, validation
from stagesweep.config.nodes import hardware_settings
from stagesweep.hardware.numerics import numerics
from stagesweep.store import stage_inputs

# Examples of every kind of value in an override.
VALUES = ("1", "0.125", "-2.5e-05", "1e-3", "word", "two-words_3", "'a, b'", "null", "true")


def rehearse() -> None:
    """Compose and validate a config as a trial does.

    Hydra's parsers build their tables while they parse, and validation caches signatures. The
    profile is that of the CPU: to find out what a GPU can do initialises CUDA.
    """
    with initialize_config_dir(str(register.folder())):
        given = ["experiment=digits", "hardware=cpu", "seed=0", "stage.joint.optimizer.lr=1e-3"]
        cfg = compose("config", overrides=given, return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = "."
        HydraConfig.instance().set_config(cfg)
        OmegaConf.to_container(cfg.hydra.job_logging, resolve=True)
        del cfg["hydra"]
    validation.validate(cfg)
    stage_inputs.fingerprints(cfg, numerics(hardware_settings(cfg)))
    HydraConfig.instance().cfg = None
    OverridesParser.create().parse_overrides([f"a.b_1={value}" for value in VALUES])
