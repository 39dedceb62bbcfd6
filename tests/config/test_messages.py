"""Every error of composition becomes one line with the key and the remedy."""

import logging.config
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stagesweep.base.errors import UserError
from stagesweep.config import options
from stagesweep.config.messages import explain, nearest

Compose = Callable[..., DictConfig]

LINES = {
    "stage.joint.epoch=3": "unknown key 'stage.joint.epoch': did you mean 'epochs'?",
    "stage.jont.epochs=3": "unknown key 'stage.jont': did you mean 'joint'?",
    "modle=vae_base": "unknown key 'modle': did you mean 'model'?",
    "hydra.run.dri=x": "unknown key 'hydra.run.dri': did you mean 'dir'?",
    "stage.joint.zzz=3": "unknown key 'stage.joint.zzz': there are _target_, ",
    "stage.joint.epochs=many": "stage.joint.epochs: Value 'many' of type 'str' could not be "
    "converted to Integer",
    "seed=null": "seed must not be null",
    "hardware.device=gpu": "hardware.device: Invalid value 'gpu', expected one of "
    "[auto, cpu, cuda]",
    "model=vae_bse": "no 'vae_bse' in group 'model': did you mean 'vae_base'? there are ",
    "experiment=tinny": "no 'tinny' in group 'experiment': did you mean 'tiny'? there are ",
    "search=bayse": "no 'bayse' in group 'search': did you mean 'bayes'? there are ",
    "hardware=zzz": "no 'zzz' in group 'hardware': there are a100_40gb, ",
    "seed=[1": "cannot read 'seed=[1': no viable alternative at input '[1'",
    "seed": "cannot read 'seed': missing EQUAL at '<EOF>'",
    "seed=1,2": "Ambiguous value for argument 'seed=1,2'; 1. To use it as a list",
    "seed=interval(1,2)": "Sweep parameters 'seed=interval(1,2)' requires --multirun",
    "~stage.zzz": "Could not delete from config. 'stage.zzz' does not exist",
    "stage=fit": "Could not override 'stage'; Did you mean to override one of ",
    "stage.joint.loss.zzz.weight=1": "unknown key 'stage.joint.loss.zzz': there are "
    "reconstruction, kl, clustering; add it with '+stage.joint.loss={zzz: …}'",
    "+stage.joint.loss.kll={weight: 1}": "cannot add 'stage.joint.loss.kll' like this; use "
    "'+stage.joint.loss={kll: {weight: 1}}'",
    "model=???": "In 'config': You must specify 'model', e.g, model=<OPTION>; Available options: ",
    "seed='a\nb'": r"seed: Value 'a\nb' of type 'str' could not be converted to Integer",
    "seed='a\nb'c": r"cannot read 'seed='a\nb'c': extraneous input 'c' expecting <EOF>",
    "=3": "Config group override must be a string or a list. Got int",
}


def test_hydras_settings_are_read_by_its_resolver(compose: Compose) -> None:
    config = compose("experiment=tiny", "seed=${hydra.job.num}")
    with pytest.raises(OmegaConfBaseException) as caught:
        _ = config.seed
    assert explain(caught.value) == (
        "seed: Interpolation key 'hydra.job.num' not found; settings of Hydra are read by "
        "${hydra:job.num}"
    )


@pytest.mark.parametrize("override", LINES)
def test_composition(compose: Compose, override: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        compose("experiment=tiny", override)
    line = explain(caught.value)
    assert line is not None
    assert line.startswith(LINES[override])
    assert "\n" not in line


FILES = {
    b"a: 1\nb: [1\n": r"did not find expected ',' or ']' \(line 3, column 1\)",
    b"a: 1\0": "unacceptable character",
    b"a: \xff": "'utf-8' codec can't decode byte 0xff",
    b"a: 1\na: 2": r"found duplicate key a \(line 2, column 1\)",
    b"defaults: 3": "defaults",
}


def test_a_logging_that_python_refuses_is_one_line() -> None:
    with pytest.raises(ValueError, match="Unable to configure root logger") as caught:
        logging.config.dictConfig(
            {"version": 1, "disable_existing_loggers": False, "root": {"level": "loud"}}
        )
    assert explain(caught.value) == (
        "hydra.hydra_logging or hydra.job_logging: Unable to configure root logger: Unknown level: "
        "'loud'"
    )


@pytest.mark.parametrize("content", FILES, ids=repr)
def test_a_config_file_that_cannot_be_read_is_named(
    compose: Compose, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(content)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        compose("experiment=tiny", "model=mine", folders=[tmp_path])
    line = explain(caught.value) or ""
    assert re.match(f"cannot read {tmp_path}/model/mine.yaml: .*{FILES[content]}", line), line
    assert "\n" not in line


@pytest.mark.parametrize("group", ["search/space", "search/ablation"])
def test_an_experiment_may_have_no_space_but_a_named_one_exists(
    compose: Compose, tmp_path: Path, group: str
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [tiny, _self_]\n"
    )
    method = "bayes" if group == "search/space" else "ablation"
    config = compose("experiment=mine", f"search={method}", folders=[tmp_path])
    options.check_optional_groups()
    assert not config.search.space
    assert not config.search.ablation.variants
    compose("experiment=tiny", f"{group}=zzz")
    with pytest.raises(UserError, match=f"no 'zzz' in group '{group}': there are "):
        options.check_optional_groups()


def test_an_error_in_a_yaml_file_names_the_file(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "mine.yaml").write_text("defaults: [base_hardware]\nthreads: many\n")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        compose("experiment=tiny", "hardware=mine", folders=[tmp_path])
    assert explain(caught.value) == (
        "hardware/mine.yaml: hardware.threads: Value 'many' of type 'str' could not be converted "
        "to Integer"
    )


def fail(message: str) -> None:
    raise UserError(message)


def divide(by: int) -> float:
    return 1 / by


def test_a_user_error_of_a_constructor_is_kept() -> None:
    node = OmegaConf.create({"data": {"_target_": f"{__name__}.fail", "message": "no column x"}})
    with pytest.raises(UserError) as caught:
        instantiate(node.data, _execution_whitelist_=f"{__name__}.*")
    assert explain(caught.value) == "no column x"


def test_another_error_of_a_constructor_names_the_node() -> None:
    node = OmegaConf.create({"data": {"_target_": f"{__name__}.divide", "by": 0}})
    with pytest.raises(ZeroDivisionError) as caught:
        instantiate(node.data, _execution_whitelist_=f"{__name__}.*")
    assert explain(caught.value) == (
        "data: ZeroDivisionError: division by zero (HYDRA_FULL_ERROR=1 shows where)"
    )


def test_file_errors_have_a_message() -> None:
    assert explain(PermissionError(13, "Permission denied", "/x/y")) is not None
    assert explain(FileNotFoundError(2, "No such file", "/x/y")) is not None


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), KeyError("k")])
def test_a_bug_has_no_one_line_message(error: Exception) -> None:
    assert explain(error) is None


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.data())
def test_the_nearest_name_is_a_known_one(names: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(names))
    assert nearest(name, names) == f"did you mean '{name}'?"


def test_without_a_close_name_all_names_are_listed() -> None:
    assert nearest("zzz", ["a", "b"]) == "there are a, b"
    assert nearest("zzz", []) == "there are none"
