"""A parameter of a space: its distribution, and the overrides of each value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from stagesweep.base.errors import UserError
from stagesweep.sweep.space.overrides import as_text, read_text, same


@dataclass(frozen=True)
class Condition:
    """A parameter exists only if ``key`` has one of ``values`` (as override text)."""

    key: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"

    def holds(self, settings: Mapping[str, str]) -> bool:
        """Whether the condition holds for the settings of a point (key -> override text)."""
        given = settings.get(self.key)
        return given is not None and meaning(given) in map(meaning, self.values)


def meaning(text: str) -> str | float:
    """The value of an override's text, whatever its spelling: 1e-3 and 0.001, True and true."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    try:
        return float(text)
    except ValueError:
        return text.lower() if text.lower() in ("true", "false", "null") else text


@dataclass(frozen=True)
class Parameter:
    """One parameter of the study, and the config keys that it sets.

    A plain parameter sets its one key to its value. ``rows`` maps each choice of zipped keys to
    the values of ``keys``. ``lines`` maps each variant of an ablation to its overrides.
    """

    keys: tuple[str, ...]
    distribution: BaseDistribution
    when: Condition | None = None
    rows: Mapping[str, tuple[str, ...]] | None = None
    lines: Mapping[str, tuple[str, ...]] | None = None

    @property
    def name(self) -> str:
        """The name in the study: the keys, separated by commas when they are zipped."""
        return ",".join(self.keys)

    def settings(self, value: Any) -> dict[str, str]:
        """The settings of a value: key -> override text."""
        if self.rows is not None:
            return dict(zip(self.keys, self.rows[value], strict=True))
        return {self.name: as_text(self.exact(value))}

    def overrides(self, value: Any) -> list[str]:
        """The overrides of a value."""
        if self.lines is not None:
            return list(self.lines[value])
        return [f"{key}={text}" for key, text in self.settings(value).items()]

    def exact(self, value: Any) -> Any:
        """A stepped number without rounding errors, so that equal points compare equal."""
        match self.distribution:
            case FloatDistribution(low=low, step=float(step)):
                return float(Decimal(str(low)) + round((value - low) / step) * Decimal(str(step)))
        return value

    @property
    def continuous(self) -> bool:
        """Whether the parameter has infinitely many values."""
        return isinstance(self.distribution, FloatDistribution) and self.distribution.step is None

    def values(self) -> Sequence[Any]:
        """All values in order. Raises UserError when the parameter is continuous."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return choices
            case IntDistribution(low=low, high=high, step=step):
                return range(low, high + 1, step)
            case FloatDistribution(low=low, high=high, step=float(step)):
                count = round((high - low) / step) + 1
                return [self.exact(low + i * step) for i in range(count)]
        raise UserError(
            f"{self.name}={describe(self.distribution)}: its values cannot be listed; name them "
            "with choice(…) or range(from, to, step), or search it with search=random"
        )

    def suggest(self, trial: BaseTrial) -> Any:
        """Ask a trial for a value."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(self.name, choices)
            case IntDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_int(self.name, low, high, step=step, log=log)
            case FloatDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_float(self.name, low, high, step=step, log=log)
        raise TypeError(self.distribution)

    def read(self, given: Sequence[Any]) -> Any:
        """The value that sets the keys to the given values. Raises UserError when there is none.

        Text is a value, or how an override would write it: ``a b``, ``'a b'``, ``1e-3``.
        """
        if isinstance(self.distribution, CategoricalDistribution):
            plain = self.lines is None
            for wanted in (given, [read_text(each) for each in given]):
                for value in self.values():
                    own = self.settings(value).values()
                    if all(map(same, wanted, map(read_text, own) if plain else own)):
                        return value
        elif self._in_range(given[0]):
            return self.distribution.to_external_repr(float(given[0]))
        raise UserError(
            f"{self.name}={','.join(map(as_text, given))} is not in the space; "
            f"it is {self.name}={describe(self.distribution)}"
        )

    def _in_range(self, value: Any) -> bool:
        """Whether a number lies within the bounds and on a step."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return False
        match self.distribution:
            case (
                FloatDistribution(low=low, high=high, step=step)
                | IntDistribution(low=low, high=high, step=step)
            ) if low <= number <= high:
                steps = 0.0 if step is None else (number - low) / step
                return abs(steps - round(steps)) < 1e-8
        return False


def describe(distribution: BaseDistribution) -> str:
    """A distribution in the grammar of a space. Parsing the text gives the same distribution."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return f"choice({', '.join(map(as_text, choices))})"
        case IntDistribution(low=low, high=high, step=step, log=False):
            return f"range({low}, {high + 1}{f', {step}' if step != 1 else ''})"
        case IntDistribution(low=low, high=high):
            return f"tag(log, int(interval({low}, {high})))"
        case FloatDistribution(low=low, high=high, step=float(step)):
            return f"range({low}, {Decimal(str(high)) + Decimal(str(step))}, {step})"
        case FloatDistribution(low=low, high=high, log=True):
            return f"tag(log, interval({low}, {high}))"
        case FloatDistribution(low=low, high=high):
            return f"interval({low}, {high})"
    raise TypeError(distribution)
