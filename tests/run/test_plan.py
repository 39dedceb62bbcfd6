"""The fingerprints of a run: which stages an override changes."""

from collections.abc import Callable

from omegaconf import DictConfig

from stagesweep.config.nodes import hardware_settings
from stagesweep.run.plan import fingerprints

Compose = Callable[..., DictConfig]


def test_a_fingerprint_covers_the_part_that_a_stage_uses(compose: Compose) -> None:
    def stages(*overrides: str) -> dict[str, str]:
        cfg = compose("experiment=singlecell", *overrides)
        return fingerprints(cfg, hardware_settings(cfg))

    before = stages()
    # Override: the first stage that it changes.
    firsts = {
        "model.patients.width=64": "patients",
        "stage.patients.optimizer.lr=0.01": "patients",
        "stage.cross_validation.folds=3": "cross_validation",
        "model.cells.latent=9": "gmvae",
    }
    for override, first in firsts.items():
        after = stages(override)
        changed = [name for name in after if before[name] != after[name]]
        assert changed == list(before)[list(before).index(first) :], override
