"""Values as the text of Hydra's overrides, and back."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from stagesweep.base.errors import UserError
from stagesweep.config.messages import explain


def read_overrides(lines: Sequence[str]) -> list[Override]:
    """Parse overrides as Hydra does. Raises UserError for a syntax error."""
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except HydraException as error:
        raise UserError(explain(error) or str(error)) from error


def read_text(given: Any) -> Any:
    """The value of a text as an override would have it; anything else as it is."""
    if not isinstance(given, str):
        return given
    try:
        override = OverridesParser.create().parse_override(f"k={given}")
    except HydraException:
        return given
    return given if override.is_sweep_override() else override.value()


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same: 1 and 1.0 are, 1 and true are not."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other or (one != one and other != other))


def value_of(override: Override) -> str:
    """The value of an override as text. Equal values have equal texts."""
    value = override.value()
    if isinstance(value, bool | None):
        return as_text(value)
    return str(override.get_value_element_as_str())


def choice_text(value: Any) -> Any:
    """One of the values of a sweep: text as an override that gives this value, others as they are.

    Hydra's parser takes escapes and quotes away. The text gets quotes where it needs them.
    """
    match value:
        case QuotedString():
            return value.with_quotes()
        case str():
            return value if _reads_as(value) else quoted(value)
        case None | list() | dict():
            return as_text(value)
    return value


def quoted(value: str) -> str:
    """Text in quotes, which Hydra reads as this text."""
    return str(QuotedString(value, Quote.single).with_quotes())


def _reads_as(text: str) -> bool:
    """Whether Hydra reads a text without quotes as itself."""
    try:
        return bool(OverridesParser.create().parse_override(f"k={text}").value() == text)
    except HydraException:
        return False


def _nested(value: Any) -> str:
    """A value within a list or a dict as the text of an override."""
    match value:
        case QuotedString():
            return str(value.with_quotes())
        case str():
            return value if _reads_as(value) else quoted(value)
    return as_text(value)


def as_text(value: Any) -> str:
    """A value as the text of an override."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(_nested, value))}]"
        case dict():
            return f"{{{','.join(f'{_nested(k)}:{_nested(v)}' for k, v in value.items())}}}"
    return str(value)
