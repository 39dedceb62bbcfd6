"""The manifest of a sweep, and the lines about changes since its start."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.sweep.space.grammar import parse
from stagesweep.sweep.study import manifest

if TYPE_CHECKING:
    from conftest import Compose

SPACE = parse({"lr": "tag(log, interval(1e-4, 1e-2))", "n": "1,2"}, [])
KEYS = st.text("abc", min_size=1, max_size=2)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers()),
    lambda inner: st.dictionaries(KEYS, inner, max_size=3),
)
TREES = st.dictionaries(KEYS, PLAIN, max_size=4)


def about(config: dict[str, Any]) -> dict[str, Any]:
    identity = {"code": {"toy": "1", "torch": "2"}, "files": {"data.csv": "3"}}
    return {"space": SPACE.fingerprint(), "config": config, **identity, "environment": {}}


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None
    given_ = {
        "command": "stagesweep -m n=1,2",
        "study": "grid",
        **about({"seed": 0, "model": {"a": [1, None]}}),
    }
    manifest.write(tmp_path, given_)
    assert manifest.read(tmp_path) == given_


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"study: [1", "expected ',' or '\\]'"),
        (b"study: a\0", "unacceptable character"),
        (b"\xff\xfe\xff", "can't decode"),
        (b"", "it names no study"),
        (b"- 1", "it names no study"),
        (b"study: 3", "it names no study"),
        (b"study: a\nconfig: b", "config is no mapping"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "sweep.yaml").write_bytes(content)
    with pytest.raises(
        UserError, match=rf"sweep\.yaml is damaged: .*{reason}.*search.study"
    ) as error:
        manifest.read(tmp_path)
    assert "\n" not in str(error.value)


@given(TREES)
def test_the_same_config_has_no_changes(tree: dict[str, Any]) -> None:
    assert manifest.changes(SPACE, about(tree), about(tree)) == []


@given(TREES, TREES)
def test_any_other_config_has_a_line_for_each_key(
    now: dict[str, Any], before: dict[str, Any]
) -> None:
    lines = manifest.changes(SPACE, about(now), about(before))
    flat_now, flat_before = manifest.flat(now), manifest.flat(before)
    keys = flat_now.keys() | flat_before.keys()
    differing = {key for key in keys if flat_now.get(key) != flat_before.get(key)}
    assert {line.partition(": was ")[0] for line in lines} == differing


def test_lines_name_key_and_values() -> None:
    now, before = {"seed": 1, "model": {"a": 2}}, {"seed": 0, "model": {"a": 2}, "loss": {"b": 3}}
    other = parse({"lr": "tag(log, interval(1e-5, 1e-2))"}, [])
    lines = manifest.changes(other, about(now), about(before))
    assert lines[-2:] == ["loss.b: was 3, is absent", "seed: was 0, is 1"]
    assert [line for line in lines if line.startswith("space n: ")] != []
    assert [line for line in lines if line.startswith("space lr: was ")] != []


def test_modules_whose_code_has_changed_are_named() -> None:
    before = about({})
    now = before | {"code": {"toy": "2", "torch": "2"}}
    assert manifest.changes(SPACE, now, before) == ["code of toy"]
    now["code"] = dict.fromkeys("abcde", "")
    assert manifest.changes(SPACE, now, before) == ["code of a, b, c and 4 more"]
    del before["code"]
    assert manifest.changes(SPACE, now, before) == []


def test_code_covers_all_modules_that_trials_run(compose: "Compose") -> None:
    found = manifest.about(SPACE, compose("experiment=tiny"))["code"]
    assert {
        "stagesweep.core.fit",
        "stagesweep.systems.audiogram.model.vae",
        "torch",
    } <= found.keys()
    assert found["torch"].startswith("torch==")
    lost = compose("experiment=tiny", "model._target_=no.such.Thing")
    assert manifest.about(SPACE, lost)["code"] == {}


def test_a_file_counts_by_its_content(compose: "Compose", tmp_path: Path) -> None:
    table = tmp_path / "data.csv"
    table.write_text("a")
    given_ = compose("experiment=audiogram", f"data.path={table}")
    before = manifest.about(SPACE, given_)
    table.touch()
    assert manifest.changes(SPACE, manifest.about(SPACE, given_), before) == []
    table.write_text("b")
    now = manifest.about(SPACE, given_)
    assert manifest.changes(SPACE, now, before) == [f"content of {table}"]


def test_files_that_a_table_names_count(compose: "Compose", tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("path,transcript\na.wav,x\n")
    config = compose("experiment=speech_digits", f"data.path={table}")
    before = manifest.about(SPACE, config)
    (tmp_path / "a.wav").write_text("sound")
    now = manifest.about(SPACE, config)
    assert manifest.changes(SPACE, now, before) == [f"content of files that {table} names"]


def test_a_swept_file_counts_by_its_content(compose: "Compose", tmp_path: Path) -> None:
    names = ["a b.csv", "c,d=ü.csv"]
    for name in names:
        (tmp_path / name).write_text("a")
    swept = parse({}, ["data.path=" + ",".join(f"'{tmp_path / name}'" for name in names)])
    config = compose("experiment=audiogram")
    before = manifest.about(swept, config)
    assert sorted(before["files"]) == [str(tmp_path / name) for name in names]
    (tmp_path / names[1]).write_text("b")
    now = manifest.about(swept, config)
    assert manifest.changes(swept, now, before) == [f"content of {tmp_path / names[1]}"]


def test_an_interpolation_is_not_what_it_gives(
    compose: "Compose", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its value may depend on a swept key, and only a trial knows `hydra:job.num`."""
    key, rate = "stage.pretrain.optimizer.lr", "stage.joint.optimizer.lr"
    linked = compose("experiment=tiny", f"{key}=${{{rate}}}")
    number = compose("experiment=tiny", f"{key}={linked.stage.joint.optimizer.lr}")
    assert manifest.plain(linked) == manifest.plain(number)
    was, now = (manifest.about(SPACE, each) for each in (number, linked))
    (line,) = manifest.changes(SPACE, now, was)
    assert line.endswith(f", is ${{{rate}}}")
    in_trial = compose("experiment=tiny", "seed=${hydra:job.num}", "init_from=${oc.env:START}")
    monkeypatch.setenv("START", "a")
    before = manifest.about(SPACE, in_trial)
    assert before["config"]["seed"] == "${hydra:job.num}"
    monkeypatch.setenv("START", "b")
    now = manifest.about(SPACE, in_trial)
    assert manifest.changes(SPACE, now, before) == ["environment variable START"]
    assert "joint" in before["config"]["stage"]
    assert before["code"]


def test_settings_that_change_no_result_are_not_changes(compose: "Compose") -> None:
    """How often something is written, and threads, may differ between two starts."""
    plain = manifest.as_typed(compose("experiment=tiny"))
    same = ("stage.joint.save_every=7", "hardware.threads=2")
    assert manifest.as_typed(compose("experiment=tiny", *same)) == plain
    assert manifest.as_typed(compose("experiment=tiny", "stage.joint.epochs=7")) != plain


def test_the_refusal_names_the_remedies() -> None:
    said = str(manifest.refuse_changed(Path("multirun/x"), ["seed: was 0, is 1"]))
    assert said == (
        "multirun/x was started with other settings, code or data: seed: was 0, is 1; put them "
        "back, name another sweep with search.study=<name>, or set sweep.on_change=continue or "
        "sweep.on_change=new"
    )
