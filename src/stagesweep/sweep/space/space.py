"""The search space of a sweep: its parameters, and the points that they make.

A Space is plain data. It reads no file, and asks an Optuna trial only for values.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import BaseTrial

from stagesweep.base.errors import UserError
from stagesweep.config.messages import nearest
from stagesweep.sweep.space.parameter import Parameter, describe


@dataclass(frozen=True)
class Space:
    """The parameters of a sweep, and the overrides that all points share (``fixed``).

    A parameter with a condition comes after the parameter that the condition names. ``places`` has
    the keys that the command line sweeps: before which of ``fixed`` each was typed. ``order`` has
    keys in the order in which they were typed, where it matters.
    """

    parameters: tuple[Parameter, ...]
    fixed: list[str]
    places: Mapping[str, int] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The distributions of all parameters by name, including conditional ones."""
        return {each.name: each.distribution for each in self.parameters}

    def suggest(self, trial: BaseTrial) -> list[str]:
        """The overrides of a trial, which is asked only for parameters that exist at its point."""
        return self._walk(lambda parameter: parameter.suggest(trial))

    def overrides(self, params: Mapping[str, Any]) -> list[str]:
        """The overrides of a point, given its values by parameter."""
        return self._walk(lambda parameter: params[parameter.name])

    def arguments(self, overrides: Sequence[str]) -> list[str]:
        """All overrides of a trial, with its own in the places where their keys were typed.

        Of a key and its parent, the later wins. Overrides that were not typed come last, so that an
        ablation can remove a key that the command line sets.
        """
        last = len(self.fixed) + 1
        own = [(self.places.get(each.partition("=")[0], last), 0, each) for each in overrides]
        shared = [(place, 1, each) for place, each in enumerate(self.fixed)]
        return [each for *_, each in sorted(own + shared, key=itemgetter(0, 1))]

    def key(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The identity of a point: points with equal keys have the same config."""
        return tuple(self.overrides(params))

    def point(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """Convert settings by config key to values by parameter. Keys may be left out."""
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
        """All values of each parameter. Raises UserError when one is continuous."""
        return {each.name: list(each.values()) for each in self.parameters}

    def size(self) -> int | None:
        """The number of points, or None when a parameter is continuous."""
        if any(each.continuous for each in self.parameters):
            return None
        return math.prod(self._count(each) for each in self.parameters if each.when is None)

    def points(self, limit: int) -> Iterator[dict[str, Any]]:
        """Yield every point of the grid once. The last parameter changes fastest.

        Raises UserError when a parameter is continuous, or when there are more points than
        ``limit``.
        """
        self.grid()
        if (size := self.size() or 0) > limit:
            raise UserError(
                f"this grid has {size:,} points, more than search.max_points={limit}; sweep fewer "
                f"values, or allow it with search.max_points={size}"
            )
        return self._points({}, {}, self.parameters)

    def fingerprint(self) -> dict[str, str]:
        """The space as plain data. The order of parameters counts only where it matters."""
        said = {"order of overrides": ", ".join(self.order)} if self.order else {}
        for each in self.parameters:
            where = f" where {each.when}" if each.when else ""
            said[each.name] = describe(each.distribution) + where
            for variant, lines in (each.lines or {}).items():
                said[f"{each.name} {variant}"] = " ".join(lines)
        return said

    def difference(self, before: Mapping[str, str]) -> list[str]:
        """List the changes since a space with the fingerprint ``before``."""
        now = self.fingerprint()
        lines = [f"{name}: {before[name]} is gone" for name in before if name not in now]
        lines += [f"{name}: {now[name]} is new" for name in now if name not in before]
        return lines + [
            f"{name}: was {before[name]}, is {now[name]}"
            for name in now
            if before.get(name, now[name]) != now[name]
        ]

    def _walk(self, choose: Callable[[Parameter], Any]) -> list[str]:
        """Choose a value for each parameter that exists, and return the overrides."""
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
        """The conditional parameters, by the key that their condition names."""
        found: dict[str, list[Parameter]] = {}
        for each in self.parameters:
            if each.when is not None:
                found.setdefault(each.when.key, []).append(each)
        return found

    def _count(self, parameter: Parameter) -> int:
        """The number of points of a parameter and its conditional children."""
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
