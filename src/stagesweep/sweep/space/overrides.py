"""Values as the text of Hydra's overrides, and back."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from stagesweep.base.errors import UserError
from stagesweep.config.messages import explain


def read_overrides(lines: Sequence[str]) -> list[Override]:
    """Parse overrides as Hydra does. Raises UserError for a syntax error."""
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except HydraException as error:
        raise UserError(explain(error) or str(error)) from error


def value_of(override: Override) -> str:
    """The value of an override as text. Equal values have equal texts."""
    value = override.value()
    if isinstance(value, bool | None):
        return as_text(value)
    return str(override.get_value_element_as_str())


def as_text(value: Any) -> str:
    """A value as the text of an override."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
    return str(value)
