"""Each error in a config is reported in one line before a run starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from stagesweep.base.errors import UserError
from stagesweep.config import trust
from stagesweep.config.validation import validate

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def tiny(compose: Compose) -> Compose:
    """Apply overrides to a config that is composed once, which takes time."""
    base = compose("experiment=tiny")

    def overridden(*overrides: str) -> DictConfig:
        cfg = base.copy()
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
        return cfg

    return overridden


def test_a_good_config_passes(tiny: Compose) -> None:
    cfg = tiny()
    validate(cfg)  # raises at the first fault
    assert cfg == tiny()


LINES = {
    # missing and unresolved
    "stage.joint.epochs=???": "stage.joint.epochs is not set; give it a value: "
    "stage.joint.epochs=<value>",
    "objective.metric=???": "objective.metric is not set; give it a value: "
    "objective.metric=<value>",
    "model.latent=${modl.latent}": "model.latent: Interpolation key 'modl.latent' not found; put "
    "that back, or give model.latent a value of its own",
    # keys and numbers of schemas
    "+stage.joint.epoch=3": "unknown key 'stage.joint.epoch': did you mean 'epochs'?",
    "+stage.joint.loss.kl.weigth=3": "unknown key 'stage.joint.loss.kl.weigth': did you mean "
    "'weight'?",
    "stage.joint.epochs=0": "stage.joint.epochs=0: must be at least 1",
    "stage.joint.batch_size=0": "stage.joint.batch_size=0: must be at least 1",
    "stage.joint.optimizer.lr=0": "stage.joint.optimizer.lr=0.0: must be above 0",
    "stage.joint.optimizer.lr=nan": "stage.joint.optimizer.lr=nan: must be finite",
    "stage.joint.optimizer.betas=[0.9,1]": "stage.joint.optimizer.betas=1.0: must be below 1",
    "stage.joint.loss.kl.weight=-1": "stage.joint.loss.kl.weight=-1.0: must be at least 0",
    "stage.joint.loss.kl.weight=inf": "stage.joint.loss.kl.weight=inf: must be finite",
    "hardware.micro_batch=0": "hardware.micro_batch=0: must be at least 1",
    "seed=-1": "seed=-1: must be at least 0",
    # targets
    "model.latent=wide": "model.latent=wide: ClusteringVAE expects int",
    "+model.latnt=3": "model.latnt: ClusteringVAE takes no such argument; did you mean 'latent'?",
    "loss.kl._target_=stagesweep.loss.kl.KLL": "loss.kl._target_: cannot load "
    "'stagesweep.loss.kl.KLL': no 'KLL' in stagesweep.loss.kl; did you mean 'KL'?",
    "data._target_=mylab.data.Mice": "data._target_: 'mylab.data.Mice' is not trusted; if it is "
    "yours, export STAGESWEEP_TRUST=mylab",
    "stage.joint.optimizer._target_=torch.nn.Linear": "stage.joint.optimizer._target_: "
    "'torch.nn.Linear' is not a torch optimizer",
    "stage.joint._target_=stagesweep.stage.clustering.evaluate.Evaluate": "stage.joint._target_: "
    "'stagesweep.stage.clustering.evaluate.Evaluate' does not inherit config.Fit",
    "stage.joint.sampler={_target_: stagesweep.data.sampler.Nothing}": "stage.joint.sampler."
    "_target_: cannot load 'stagesweep.data.sampler.Nothing': no 'Nothing' in "
    "stagesweep.data.sampler; there are ",
    # settings that depend on each other
    "+stage.joint.loss={kll: {weight: 1}}": "stage.joint.loss.kll: no such loss term; did you mean "
    "'kl'?",
    "stage.pretrain.loss={reconstruction: {weight: 0}, kl: {weight: 0}}": "stage.pretrain.loss: no "
    "term has a weight above 0; add one: '+stage.pretrain.loss={<term>: {weight: 1}}'",
    "stage.joint.select=val_loss": "stage.joint.select=val_loss is not kept by stage.joint.best; "
    "there are last",
    "+stage.joint.best.val_los=min": "stage.joint.best.val_los: no such metric; did you mean "
    "'val_loss'?",
    "+stage.joint.early_stop={val_loss: {mode: min}}": "stage.joint.early_stop.val_loss: set its "
    "patience or its target",
    "+stage.joint.early_stop={val_nmi: {patience: 3}}": "stage.joint.early_stop.val_nmi: no such "
    "metric; did you mean ",
    "stage.joint.schedule={decay: plateau, metric: val_acc}": "stage.joint.schedule.metric=val_acc:"
    " no such metric; ",
    "+stage.joint.later=1": "unknown key 'stage.joint.later': ",
    "~stage.init_clusters": "stage.joint.loss.clustering needs cluster centres; put an "
    "init_clusters stage before stage.joint",
    "~stage.pretrain": "stage.init_clusters comes before any training; put it after a fit",
    "+stage.extra=3": "stage.extra is not a stage; add one with '+stage@stage.extra=<kind>'",
    "objective.metric=evaluate/nmy": "objective.metric=evaluate/nmy: stage evaluate has no 'nmy'; "
    "did you mean 'nmi'?",
    "objective.metric=joint/val_clustering": "objective.metric=joint/val_clustering: stage joint "
    "has no 'val_clustering'; did you mean 'train_clustering'?",
    "objective.metric=pretrain/label_change": "objective.metric=pretrain/label_change: stage "
    "pretrain has no 'label_change'; there are ",
    "+stage.joint.early_stop={val_clustering: {patience: 3}}": "stage.joint.early_stop."
    "val_clustering: no such metric; did you mean 'train_clustering'?",
    "objective.metric=evaluation/nmi": "objective.metric=evaluation/nmi: no stage 'evaluation'; "
    "did you mean 'evaluate'?",
    "objective.metric=nmi": "objective.metric=nmi: no stage 'nmi'; there are pretrain, ",
    # files
    "init_from=nowhere.pt": "init_from=nowhere.pt: no such file or folder (looked from ",
    "+data.path=nowhere.csv": "data.path=nowhere.csv: no such file or folder (looked from ",
}


@pytest.mark.parametrize("override", LINES)
def test_errors_name_the_key_and_the_remedy(tiny: Compose, override: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(tiny(override))
    assert str(caught.value).startswith(LINES[override])
    assert "\n" not in str(caught.value)


def test_a_reversed_range_of_k_is_refused(compose: Compose) -> None:
    cfg = compose("experiment=tiny", "+stage@stage.k=choose_clusters", "stage.k.k_range=[9,3]")
    with pytest.raises(UserError) as caught:
        validate(cfg)
    assert str(caught.value) == "stage.k.k_range=[9,3]: the smaller number comes first"


def test_init_from_replaces_earlier_stages(tiny: Compose, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.touch()
    cfg = tiny("~stage.pretrain", f"init_from={weights}")
    validate(cfg)  # raises at the first fault
    assert "pretrain" not in cfg.stage


def test_a_term_of_weight_zero_has_no_requirements(tiny: Compose) -> None:
    off = "stage.joint.loss.clustering.weight=0"
    for given in (
        ("~stage.init_clusters", off),
        (off, "+stage.joint.early_stop={label_change: {target: 0.001}}"),
    ):
        cfg = tiny(*given)
        validate(cfg)  # raises at the first fault
        assert cfg.stage.joint.loss.clustering.weight == 0


@pytest.mark.parametrize("key", ["micro_batch=auto", "compile=true"])
def test_settings_that_a_sharded_model_does_not_support_are_refused(
    tiny: Compose, key: str
) -> None:
    with pytest.raises(UserError, match=f"^hardware.{key} .*hardware.parallel=shard.*; set"):
        validate(tiny("hardware.parallel=shard", f"hardware.{key}"))


def test_a_run_without_stages_is_refused(tiny: Compose) -> None:
    names = ("pretrain", "init_clusters", "joint", "evaluate")
    with pytest.raises(UserError, match=r"^a run needs at least one stage; "):
        validate(tiny(*(f"~stage.{name}" for name in names)))


def test_validation_does_not_change_the_config(tiny: Compose) -> None:
    cfg = tiny("model.latent=${model.clusters}")
    validate(cfg)
    assert cfg._get_node("model")._get_node("latent")._value() == "${model.clusters}"


def test_a_custom_stage_is_bound(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stages_of_mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from stagesweep.config.schema import bounded\n"
        "@dataclass\n"
        "class Count:\n"
        "    k: int = bounded(1, ge=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "added", ("stages_of_mine.*",))
    own = "+stage.count={_target_: stages_of_mine.Count, k: 3}"
    validate(tiny(own, "objective.metric=count/any"))
    with pytest.raises(UserError, match=r"^stage.count.k=x: Count expects int$"):
        validate(tiny(own, "stage.count.k=x"))
    with pytest.raises(UserError, match=r"^stage.count.k=0: must be at least 1$"):
        validate(tiny(own, "stage.count.k=0"))
