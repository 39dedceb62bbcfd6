"""The space a sweep searches: what may vary, together with what, and where it exists at all.

A Space is plain data: it reads no file, and asks Optuna for nothing but values.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from stagesweep.base.errors import UserError
from stagesweep.config.messages import explain, nearest


@dataclass(frozen=True)
class Condition:
    """A parameter exists only where ``key`` has one of ``values`` (as override text)."""

    key: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.values)}"

    def holds(self, settings: Mapping[str, str]) -> bool:
        """Whether it holds at a point, given what the point sets."""
        return settings.get(self.key) in self.values


@dataclass(frozen=True)
class Parameter:
    """One parameter of the study, the keys it sets and the overrides each of its values stands for.

    ``rows`` has the values of ``keys`` for each choice of zipped keys, ``lines`` the overrides for
    each variant of an ablation; a plain parameter sets its one key to its value.
    """

    keys: tuple[str, ...]
    distribution: BaseDistribution
    when: Condition | None = None
    rows: Mapping[str, tuple[str, ...]] | None = None
    lines: Mapping[str, tuple[str, ...]] | None = None

    @property
    def name(self) -> str:
        """Its name in the study: the keys, with commas between zipped ones."""
        return ",".join(self.keys)

    def settings(self, value: Any) -> dict[str, str]:
        """What a value sets each of the keys to, as override text."""
        if self.rows is not None:
            return dict(zip(self.keys, self.rows[value], strict=True))
        return {self.name: as_text(self.exact(value))}

    def overrides(self, value: Any) -> list[str]:
        """The overrides that a value stands for."""
        if self.lines is not None:
            return list(self.lines[value])
        return [f"{key}={text}" for key, text in self.settings(value).items()]

    def exact(self, value: Any) -> Any:
        """A number in steps without the error of adding them up, so that equal points are equal."""
        match self.distribution:
            case FloatDistribution(low=low, step=float(step)):
                return float(Decimal(str(low)) + round((value - low) / step) * Decimal(str(step)))
        return value

    @property
    def continuous(self) -> bool:
        """Whether its values cannot be listed."""
        return isinstance(self.distribution, FloatDistribution) and self.distribution.step is None

    def values(self) -> Sequence[Any]:
        """All values in order; UserError when they cannot be listed."""
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
        """Ask Optuna for a value."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                return trial.suggest_categorical(self.name, choices)
            case IntDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_int(self.name, low, high, step=step, log=log)
            case FloatDistribution(low=low, high=high, step=step, log=log):
                return trial.suggest_float(self.name, low, high, step=step, log=log)
        raise TypeError(self.distribution)

    def read(self, given: Sequence[Any]) -> Any:
        """The value that sets the keys to what a person gave; UserError when there is none."""
        texts = tuple(
            value_of(override) for override in read_overrides([f"x={as_text(v)}" for v in given])
        )
        if isinstance(self.distribution, CategoricalDistribution):
            every = {tuple(self.settings(value).values()): value for value in self.values()}
            if texts in every:
                return every[texts]
        elif self._contains(given[0]):
            return self.distribution.to_external_repr(float(given[0]))
        raise UserError(
            f"{self.name}={','.join(texts)} is not in the space; "
            f"it is {self.name}={describe(self.distribution)}"
        )

    def _contains(self, value: Any) -> bool:
        try:
            return self.distribution._contains(float(value))
        except (TypeError, ValueError):
            return False


@dataclass(frozen=True)
class Space:
    """What differs between the points of a sweep (``parameters``, a condition after what it names).

    ``fixed`` are the overrides that all points share.
    """

    parameters: tuple[Parameter, ...]
    fixed: list[str]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """All parameters of the study by name, those that exist only at some points included."""
        return {each.name: each.distribution for each in self.parameters}

    def suggest(self, trial: BaseTrial) -> list[str]:
        """The overrides of a trial; Optuna is asked only for what exists at its point."""
        return self._walk(lambda parameter: parameter.suggest(trial))

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a point, given its parameters as the study has them."""
        return self._walk(lambda parameter: params[parameter.name])

    def key(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """What tells a point from others: two points with the same key are the same config."""
        return tuple(self.overrides(params))

    def point(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The study's parameters for settings by key, some of which may be left to the sampler."""
        known = [key for each in self.parameters for key in each.keys]
        for key in named:
            if key not in known:
                raise UserError(f"'{key}' is not in the space: {nearest(key, known)}")
        params = {}
        for each in self.parameters:
            given = [key for key in each.keys if key in named]
            if 0 < len(given) < len(each.keys):
                raise UserError(f"{given[0]} moves with the others of {each.name}; set them all")
            if given:
                params[each.name] = each.read([named[key] for key in each.keys])
        return params

    def grid(self) -> dict[str, list[Any]]:
        """All values of each parameter; UserError when one is continuous."""
        return {each.name: list(each.values()) for each in self.parameters}

    def size(self) -> int | None:
        """How many points there are; None when a parameter is continuous."""
        if any(each.continuous for each in self.parameters):
            return None
        return math.prod(self._count(each) for each in self.parameters if each.when is None)

    def points(self, limit: int) -> Iterator[dict[str, Any]]:
        """Every point of the grid once, the last parameter changing fastest.

        UserError when a parameter is continuous, or when there are more points than ``limit``.
        """
        self.grid()
        if (size := self.size() or 0) > limit:
            raise UserError(
                f"this grid has {size:,} points, more than search.max_points={limit}; sweep fewer "
                f"values, or allow it with search.max_points={size}"
            )
        return self._points({}, {}, self.parameters)

    def fingerprint(self) -> dict[str, str]:
        """The space as plain data: equal for equal spaces, whatever their order."""
        said = {}
        for each in self.parameters:
            where = f" where {each.when}" if each.when else ""
            said[each.name] = describe(each.distribution) + where
            for variant, lines in (each.lines or {}).items():
                said[f"{each.name} {variant}"] = " ".join(lines)
        return said

    def difference(self, before: Mapping[str, str]) -> list[str]:
        """Lines that say what changed since a space with the fingerprint ``before``."""
        now = self.fingerprint()
        lines = [f"{name}: {before[name]} is gone" for name in before if name not in now]
        lines += [f"{name}: {now[name]} is new" for name in now if name not in before]
        return lines + [
            f"{name}: was {before[name]}, is {now[name]}"
            for name in now
            if before.get(name, now[name]) != now[name]
        ]

    def _walk(self, choose: Callable[[Parameter], Any]) -> list[str]:
        """The overrides of the point at which each parameter has the value that is chosen."""
        settings: dict[str, str] = {}
        lines: list[str] = []
        for each in self.parameters:
            if each.when is None or each.when.holds(settings):
                value = choose(each)
                settings |= each.settings(value)
                lines += each.overrides(value)
        return lines

    @cached_property
    def _children(self) -> dict[str, list[Parameter]]:
        """The parameters that exist only where a key has some value, by that key."""
        found: dict[str, list[Parameter]] = {}
        for each in self.parameters:
            if each.when is not None:
                found.setdefault(each.when.key, []).append(each)
        return found

    def _count(self, parameter: Parameter) -> int:
        """How many points a parameter and those that depend on it make."""
        children = [child for key in parameter.keys for child in self._children.get(key, ())]
        if not children:
            return len(parameter.values())
        return sum(
            math.prod(self._count(c) for c in children if c.when and c.when.holds(settings))
            for settings in map(parameter.settings, parameter.values())
        )

    def _points(
        self, params: dict[str, Any], settings: dict[str, str], rest: tuple[Parameter, ...]
    ) -> Iterator[dict[str, Any]]:
        if not rest:
            yield params
            return
        first, *others = rest
        if first.when is not None and not first.when.holds(settings):
            yield from self._points(params, settings, tuple(others))
            return
        for value in first.values():
            settings_then = settings | first.settings(value)
            yield from self._points(params | {first.name: value}, settings_then, tuple(others))


def describe(distribution: BaseDistribution) -> str:
    """A distribution in the grammar of a space, which reads it back as the same."""
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


def read_overrides(lines: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them; UserError for what it does not."""
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except HydraException as error:
        raise UserError(explain(error) or str(error)) from error


def value_of(override: Override) -> str:
    """The value of an override as text: of equal values the same one."""
    value = override.value()
    if isinstance(value, bool | None):
        return as_text(value)
    return str(override.get_value_element_as_str())


def as_text(value: Any) -> str:
    """A value as it stands in an override."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
    return str(value)
