"""Plans a run: validates its config, fingerprints its stages, looks them up in the store.

Imports torch only for a config that names it and of which some stage has to run.
"""

from contextlib import suppress
from dataclasses import dataclass

from omegaconf import DictConfig

from stagesweep.config.schema import Hardware, Resume, objectives
from stagesweep.config.validation import validate_structure, validate_targets
from stagesweep.hardware.numerics import numerics
from stagesweep.store import stage_inputs
from stagesweep.store.store import Store


@dataclass
class Plan:
    """The fingerprint of each stage, in order, and whether the store has all of them."""

    fingerprints: dict[str, str]
    all_stored: bool


def plan(cfg: DictConfig, hardware: Hardware) -> Plan:
    """Validate a config and plan its run. Raises UserError before anything is allocated.

    A config whose stages are all stored was validated, with the same code, when they ran, so that
    importing its targets can be left out.
    """
    resolved: DictConfig | None = None
    keys: dict[str, str] | None = None
    with suppress(Exception):  # whatever the error, validation has the better message
        resolved = validate_structure(cfg)
        keys = fingerprints(cfg, hardware)
        if cfg.resume is not Resume.never and all_stored(keys, list(objectives(cfg.objective))):
            return Plan(keys, all_stored=True)
    validate_targets(validate_structure(cfg) if resolved is None else resolved)
    from stagesweep.hardware.profile import choose_device

    choose_device(hardware)
    return Plan(fingerprints(cfg, hardware) if keys is None else keys, all_stored=False)


def fingerprints(cfg: DictConfig, hardware: Hardware) -> dict[str, str]:
    """The fingerprint of each stage on this machine, in order."""
    return stage_inputs.fingerprints(cfg, numerics(hardware))


def all_stored(keys: dict[str, str], metrics: list[str]) -> bool:
    """Whether every stage can be reused, and the stored stages have these metrics."""
    entries = {name: Store.default().entry(key) for name, key in keys.items()}
    manifests = {name: entry.manifest or {} for name, entry in entries.items()}
    if not all(manifests.values()) or any(entry.damage() for entry in entries.values()):
        return False
    wanted = [name.partition("/") for name in metrics]
    return all(metric in manifests[stage]["metrics"] for stage, _, metric in wanted)
