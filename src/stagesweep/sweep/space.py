"""The space a sweep searches: what may vary, together with what, and where it exists at all.

Values are written in the grammar of Hydra's Optuna sweeper, which also reads them here: a space in
YAML and a key swept on the command line are the same thing. A Space is plain data: it reads no
file, and asks Optuna for nothing but values.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from itertools import pairwise
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.errors import HydraException
from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from stagesweep.errors import UserError
from stagesweep.explain import explain, nearest

# The parameter of an ablation, and its value where nothing is left out.
ABLATION = "ablation"
FULL = "full"


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
        return {self.name: _text(self.exact(value))}

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
        texts = tuple(_value(override) for override in _parse([f"x={_text(v)}" for v in given]))
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


def parse(
    space: Mapping[str, str],
    arguments: Sequence[str],
    *,
    together: Sequence[Sequence[str]] = (),
    when: Mapping[str, str] | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
    leave_one_out: Sequence[str] = (),
) -> Space:
    """Read a space (``search.space``) and what the command line sweeps or fixes, which wins.

    Args:
        space: key -> what it may be.
        arguments: overrides as typed.
        together: groups of keys whose lists of values are zipped (``search.zip``).
        when: key -> the condition ``parent=value[,value]`` under which it exists.
        variants: name -> overrides of a variant of an ablation.
        leave_one_out: overrides, each a variant by itself.

    Raises:
        UserError: in one line that names the key and the remedy.

    """
    overrides = _parse([f"{key}={text}" for key, text in space.items()])
    typed = _parse(arguments)
    last = {_key(override): override for override in (*overrides, *typed)}
    swept = {key: override for key, override in last.items() if override.is_sweep_override()}
    fixed = {key: _value(override) for key, override in last.items() if key not in swept}
    parameters = [_plain(override) for override in swept.values()]
    parameters = _zipped(parameters, together, fixed)
    if variants or leave_one_out:
        parameters.insert(0, _ablation(variants or {}, leave_one_out, swept))
    for each in parameters:
        _refuse_duplicates(each)
    parameters = _conditional(parameters, when or {}, fixed)
    lines = [each for each in overrides if last[_key(each)] is each] + typed
    return Space(tuple(parameters), [str(each.input_line) for each in lines if _key(each) in fixed])


def describe(distribution: BaseDistribution) -> str:
    """A distribution in the grammar of a space, which reads it back as the same."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return f"choice({', '.join(map(_text, choices))})"
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


def _parse(lines: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except HydraException as error:
        raise UserError(explain(error) or str(error)) from error


def _key(override: Override) -> str:
    """What an override is about, however it does it (``+`` adds, ``~`` takes out)."""
    return override.get_key_element().lstrip("+~")


def _value(override: Override) -> str:
    """The value of an override as text: of equal values the same one."""
    value = override.value()
    if isinstance(value, bool | None):
        return _text(value)
    return str(override.get_value_element_as_str())


def _values(override: Override) -> tuple[str, ...]:
    """The values of a plain list or of one value, as override text."""
    if not override.is_choice_sweep():
        return (_value(override),)
    return tuple(map(_text, override.sweep_iterator(transformer=Transformer.encode)))


def _text(value: Any) -> str:
    """A value as it stands in an override."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
    return str(value)


def _plain(override: Override) -> Parameter:
    """The parameter of one key."""
    line, value = override.input_line, override.value()
    if getattr(value, "shuffle", False):
        raise UserError(f"{line}: leave shuffle(…) out; the order of the points is the sampler's")
    if isinstance(value, IntervalSweep):
        _check_interval(str(line), value)
    try:
        distribution = create_optuna_distribution_from_override(override)
    except (AssertionError, NotImplementedError) as error:
        raise UserError(f"{line}: cannot be searched; list the values with choice(…)") from error
    except ValueError as error:
        raise UserError(f"{line}: {error}") from error
    if isinstance(distribution, CategoricalDistribution):
        distribution = _choices(distribution.choices)
    return Parameter((override.get_key_element(),), distribution)


def _check_interval(line: str, value: IntervalSweep) -> None:
    """Refuse bounds that mean nothing, and tags that would be passed over."""
    start, end = float(value.start or 0), float(value.end or 0)
    if unknown := sorted(set(value.tags) - {"log"}):
        raise UserError(f"{line}: unknown tag '{unknown[0]}': {nearest(unknown[0], ['log'])}")
    if not (math.isfinite(start) and math.isfinite(end)):
        raise UserError(f"{line}: the ends of an interval must be finite")
    if start > end:
        raise UserError(f"{line}: the interval starts above its end; swap them")
    if "log" in value.tags and start <= 0:
        raise UserError(f"{line}: a log scale has no zero; start the interval above it")


def _choices(values: Sequence[Any]) -> CategoricalDistribution:
    """Choices that Optuna can tell apart (it finds a value by ==) and store: else their texts."""
    finite = not any(isinstance(v, float) and not math.isfinite(v) for v in values)
    apart = len(set(values)) == len(values)
    return CategoricalDistribution(values if finite and apart else list(map(_text, values)))


def _refuse_duplicates(parameter: Parameter) -> None:
    if isinstance(parameter.distribution, CategoricalDistribution):
        texts = [_text(choice) for choice in parameter.distribution.choices]
        if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
            raise UserError(f"{parameter.name} lists {twice[0]} twice; name every value once")


def _zipped(
    parameters: list[Parameter], groups: Sequence[Sequence[str]], fixed: Mapping[str, str]
) -> list[Parameter]:
    """Put the keys of each group into one parameter, where the first of them is."""
    for group in groups:
        if all(key in fixed for key in group):
            continue
        own = {each.name: each for each in parameters}
        for key in group:
            if key not in own:
                raise UserError(f"search.zip: {key} is not swept by itself: {nearest(key, own)}")
        if len(set(group)) < 2:
            raise UserError(f"search.zip: {group[0]} is alone; a group names two or more keys")
        members = [own[key] for key in group]
        first = parameters.index(members[0])
        parameters = [
            _together(members) if i == first else each
            for i, each in enumerate(parameters)
            if i == first or each not in members
        ]
    return parameters


def _together(members: Sequence[Parameter]) -> Parameter:
    """One parameter whose choices are the first values of all, the second values of all ..."""
    columns = [[_text(each.exact(v)) for v in each.values()] for each in members]
    for (one, a), (two, b) in pairwise(zip(members, columns, strict=True)):
        if len(a) != len(b):
            raise UserError(
                f"search.zip: {one.name} has {len(a)} values and {two.name} {len(b)}; "
                "keys that move together need equally many"
            )
    rows = list(zip(*columns, strict=True))
    names = [",".join(row) for row in rows]
    keys = tuple(each.name for each in members)
    distribution = CategoricalDistribution(names)
    return Parameter(keys, distribution, rows=dict(zip(names, rows, strict=True)))


def _ablation(
    variants: Mapping[str, Sequence[str]], leave_one_out: Sequence[str], swept: Iterable[str]
) -> Parameter:
    """The full model first, then each variant; what is left out one at a time names itself."""
    lines: dict[str, tuple[str, ...]] = {FULL: ()}
    for name, own in (*variants.items(), *((line, [line]) for line in leave_one_out)):
        place = f"search.ablation: {name}"
        if name in lines:
            raise UserError(f"{place} is there already; give every variant a name of its own")
        if not own:
            raise UserError(f"{place} changes nothing; that is '{FULL}', which is always there")
        if same := [other for other in lines if lines[other] == tuple(own)]:
            raise UserError(f"{place} changes the same as {same[0]}; keep one of them")
        for override in _parse(own):
            if override.is_sweep_override():
                raise UserError(f"{place}: {override.input_line}: a variant has one value a key")
            if _key(override) in swept:
                raise UserError(f"{place} sets {_key(override)}, which is swept; do one of the two")
        lines[name] = tuple(own)
    return Parameter((ABLATION,), CategoricalDistribution(list(lines)), lines=lines)


def _conditional(
    parameters: Sequence[Parameter], when: Mapping[str, str], fixed: Mapping[str, str]
) -> list[Parameter]:
    """Give parameters their conditions, and put each after the one that it depends on."""
    known = {key: each for each in parameters for key in each.keys}
    for key in when:
        if key not in known and key not in fixed:
            raise UserError(f"search.when: {key} is not swept: {nearest(key, known)}")
    pending = [replace(each, when=_condition(each, when, known, fixed)) for each in parameters]
    ordered: list[Parameter] = []
    there, settled = dict(fixed), set(fixed)
    while pending:
        ready = (each for each in pending if each.when is None or each.when.key in settled)
        if (each := next(ready, None)) is None:
            names = " and ".join(each.name for each in pending)
            raise UserError(f"search.when: {names} wait for each other; free one of them")
        pending.remove(each)
        settled |= set(each.keys)
        if each.when is None or each.when.holds(there):
            ordered.append(replace(each, when=None))
        elif any(each.when.key in other.keys for other in ordered):
            ordered.append(each)
        # Else what it depends on is fixed to another value: it exists nowhere.
    return ordered


def _condition(
    parameter: Parameter,
    when: Mapping[str, str],
    known: Mapping[str, Parameter],
    fixed: Mapping[str, str],
) -> Condition | None:
    """The condition of a parameter, on a key that is fixed or can have the values it names."""
    said = {when.get(key) for key in parameter.keys}
    if len(said) > 1:
        raise UserError(f"search.when: {parameter.name} move together; give all one condition")
    if (text := said.pop()) is None:
        return None
    place = f"search.when: {parameter.name} where {text}"
    if "=" not in text:
        raise UserError(f"{place}: write it as key=value, or key=value,value")
    (override,) = _parse([text])
    condition = Condition(_key(override), _values(override))
    if condition.key in fixed:
        return condition
    if (parent := known.get(condition.key)) is None:
        others = [key for key in (*known, *fixed) if key not in parameter.keys]
        hint = nearest(condition.key, others)
        raise UserError(f"{place}: {condition.key} is neither swept nor set: {hint}")
    if parent.continuous:
        raise UserError(f"{place}: {condition.key} is continuous; a condition needs a choice(…)")
    can_be = [parent.settings(value)[condition.key] for value in parent.values()]
    for value in condition.values:
        if value not in can_be:
            hint = nearest(value, can_be)
            raise UserError(f"{place}: {condition.key} is never {value}: {hint}")
    return condition
