import pytest

from stagesweep.base.errors import UserError
from stagesweep.config.bounds import broken_bound, check_bounds


@pytest.mark.parametrize(
    ("number", "rule", "expected"),
    [
        (1, {"ge": 1}, None),
        (0, {"ge": 1}, "must be at least 1"),
        (0.0, {"gt": 0}, "must be above 0"),
        (1.0, {"lt": 1}, "must be below 1"),
        (float("-inf"), {}, "must be finite"),
        (None, {"ge": 1}, None),
        (False, {"ge": 1}, None),
        ("text", {"ge": 1}, None),
    ],
)
def test_bounds(number: object, rule: dict[str, float], expected: str | None) -> None:
    assert broken_bound(number, rule) == expected


def test_each_value_of_a_list_or_mapping_is_checked() -> None:
    check_bounds("key", [1, 2], {"ge": 1})
    with pytest.raises(UserError, match=r"^key=0: must be at least 1$"):
        check_bounds("key", [1, 0], {"ge": 1})
    with pytest.raises(UserError, match=r"^key=-2: must be at least 1$"):
        check_bounds("key", {"a": -2}, {"ge": 1})
