"""Nodes are bound to the signature of their target."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.config import trust
from stagesweep.config.nodes import target_nodes
from stagesweep.config.schema import Mode
from stagesweep.config.signatures import bind, fits, locate

LAB = """
from collections.abc import Sequence
from typing import Literal

class Model:
    def __init__(self, spec, *, width: int, rate: float = 0.1, name: str | None = None,
                 kind: Literal["a", "b"] = "a", widths: Sequence[int] = ()): ...

def anything(*args: int, **kwargs: int): ...

number = 3
"""


@pytest.fixture(autouse=True)
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the user's own."""
    (tmp_path / "lab.py").write_text(LAB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "added", ("lab.*",))
    monkeypatch.delitem(sys.modules, "lab", raising=False)


def node(**values: Any) -> dict[str, Any]:
    return {"_target_": "lab.Model", "width": 3} | values


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"widht": 4}, "model.widht: Model takes no such argument; did you mean 'width'?"),
        ({"width": "x"}, "model.width=x: Model expects int"),
        ({"width": 1.5}, "model.width=1.5: Model expects int"),
        ({"width": True}, "model.width=True: Model expects int"),
        ({"rate": "fast"}, "model.rate=fast: Model expects float"),
        ({"name": 1}, "model.name=1: Model expects str | None"),
        ({"kind": "c"}, "model.kind=c: Model expects Literal['a', 'b']"),
        ({"widths": [1, "a"]}, "model.widths=[1, 'a']: Model expects Sequence[int]"),
        ({"widths": 3}, "model.widths=3: Model expects Sequence[int]"),
        ({"spec": 3}, "model.spec: Model takes no such argument; there are width, rate, name, "
                      "kind, widths"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        bind("model", node(**values), supplied=["spec"])
    assert str(caught.value) == line


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(UserError) as caught:
        bind("model", {"_target_": "lab.Model"}, supplied=["spec"])
    assert str(caught.value) == "model: Model needs 'width'; add model.width=<value>"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rate": 1},
        {"name": None, "kind": "b", "widths": []},
        {"name": {"_target_": "lab.anything"}},
        {"_convert_": "all"},
    ],
)
def test_valid_arguments_pass(values: dict[str, Any]) -> None:
    given = node(**values)
    bind("model", given, supplied=["spec"])  # raises at the first fault
    assert given == node(**values), "it only looks"


def test_keyword_arguments_partials_and_library_classes_pass() -> None:
    for node in (
        {"_target_": "lab.anything", "x": 1},
        {"_target_": "lab.Model", "_partial_": True},
        {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3},
    ):
        assert bind("any", node) is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("lab.Modle", "x._target_: cannot load 'lab.Modle': no 'Modle' in lab; did you mean "
                      "'Model'?"),
        ("lab.none.Model", "x._target_: cannot load 'lab.none.Model': module 'lab' has no "
                           "attribute 'none'"),
        ("lab.number", "x._target_: 'lab.number' is not a class or function"),
        ("os.system", "x._target_: 'os.system' is not trusted; if it is yours, "
                      "export STAGESWEEP_TRUST=os"),
        ("labels.Model", "x._target_: 'labels.Model' is not trusted; if it is yours, "
                         "export STAGESWEEP_TRUST=labels"),
        (3, "x._target_ must be the dotted name of a class or function"),
    ],
)  # fmt: skip
def test_an_invalid_target_is_named(target: Any, line: str) -> None:
    with pytest.raises(UserError) as caught:
        locate("x", target)
    assert str(caught.value) == line


def test_nested_nodes_are_found() -> None:
    inner = {"_target_": "b"}
    tree = {"model": {"_target_": "a", "parts": [inner, {"deep": inner}]}, "seed": 3}
    assert [path for path, _ in target_nodes(tree)] == [
        "model",
        "model.parts[0]",
        "model.parts[1].deep",
    ]


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("min", Mode, True),
        ("mean", Mode, False),
        (None, int | None, True),
        (1, float, True),
        (True, float, False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        ({"a": None}, Mapping[str, str | None], True),
        ({"a": 1}, Mapping[str, str | None], False),
        ([1], dict[str, int], False),
        ("ab", Sequence[str], False),
        (1, Literal[1, 2], True),
        (3, Any, True),
        (3, Path, True),
        (3, "unresolved", True),
    ],
)
def test_values_against_annotations(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected


PLAIN = {int: st.integers(), float: st.floats(), str: st.text(), bool: st.booleans()}


@given(st.sampled_from(list(PLAIN)).flatmap(lambda kind: st.tuples(st.just(kind), PLAIN[kind])))
def test_a_value_of_a_type_fits_the_type_and_its_containers(case: tuple[type, Any]) -> None:
    kind, value = case
    assert fits(value, kind)
    assert fits([value], list[kind])  # type: ignore[valid-type]
    assert fits({"a": value}, dict[str, kind])  # type: ignore[valid-type]
    assert fits(value, kind | None)
    assert not fits([value], kind)
