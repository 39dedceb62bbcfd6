"""A trial gets the value that Hydra reads from the typed text."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from stagesweep.config.register import study_name
from stagesweep.sweep.space.grammar import parse
from stagesweep.sweep.space.overrides import quoted

WORDS = st.text("abü ñ日&=,:'\"\\[]{}()#;1.-", max_size=6).map(quoted)
NUMBERS = st.integers(-99, 99).map(str) | st.floats(-1e3, 1e3).map(repr)
PLAIN = st.sampled_from(["word", "two words", "a\\,b", "a\\=b", "null", "true", "1e-3", "a/b.csv"])
INTERPOLATIONS = st.sampled_from(
    ["${seed}", "${..epochs}", "${hydra:job.num}", "${oc.env:HOME}", "'${oc.env:HOME} ü'"]
)
SINGLE = WORDS | NUMBERS | PLAIN | INTERPOLATIONS
LISTS = st.lists(SINGLE, max_size=3).map(lambda items: f"[{','.join(items)}]")
DICTS = st.dictionaries(st.sampled_from(["a", "b"]), SINGLE | LISTS).map(
    lambda items: f"{{{','.join(f'{k}:{v}' for k, v in items.items())}}}"
)
VALUES = SINGLE | LISTS | DICTS


def read(line: str) -> Any:
    """The value that Hydra reads."""
    return OverridesParser.create().parse_override(line).value()


@settings(max_examples=150, deadline=None)
@given(values=st.lists(VALUES, min_size=2, max_size=2, unique_by=lambda v: repr(read(f"k={v}"))))
def test_a_trial_gets_the_typed_value(values: list[str]) -> None:
    wanted = [read(f"k={value}") for value in values]
    (parameter,) = parse({}, [f"k={','.join(values)}"]).parameters
    texts = [parameter.overrides(value) for value in parameter.values()]
    assert repr([read(line) for (line,) in texts]) == repr(wanted)
    # A value that all trials share is passed on as it was typed.
    assert parse({}, [f"k={values[0]}", "x=1,2"]).fixed == [f"k={values[0]}"]
    names = {study_name("grid", [f"k={value}", "x=1,2"]) for value in values}
    assert len(names) == len(values)


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        ("'a b.csv','c&d=e.csv'", ["'a b.csv'", "'c&d=e.csv'"]),
        ("\\,a,b", ["',a'", "b"]),
        ("1,'1'", ["1", "'1'"]),
        ("['ü, x'],[d]", ["['ü, x']", "[d]"]),
    ],
)
def test_a_value_keeps_its_quotes(typed: str, texts: list[str]) -> None:
    (parameter,) = parse({}, [f"k={typed}"]).parameters
    assert [parameter.overrides(v) for v in parameter.values()] == [[f"k={t}"] for t in texts]
