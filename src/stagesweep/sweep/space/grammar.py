"""Parses a search space from YAML and from the command line.

Both use the grammar of Hydra's Optuna sweeper, whose parser is used here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from optuna.distributions import CategoricalDistribution

from stagesweep.base import compat
from stagesweep.base.errors import UserError
from stagesweep.config.messages import nearest
from stagesweep.sweep.space.overrides import as_text, choice_text, read_overrides, value_of
from stagesweep.sweep.space.parameter import Condition, Parameter, meaning
from stagesweep.sweep.space.space import Space

# The parameter of an ablation, and its value for the full model.
ABLATION = "ablation"
FULL = "full"


def parse(
    space: Mapping[str, Any],
    arguments: Sequence[str],
    *,
    zipped: Sequence[Sequence[str]] = (),
    when: Mapping[str, str] | None = None,
    variants: Mapping[str, Sequence[str]] | None = None,
    leave_one_out: Sequence[str] = (),
) -> Space:
    """Parse a space (``search.space``). Overrides of the command line take precedence.

    Args:
        space: key -> its values, as override text or as a list.
        arguments: overrides of the command line.
        zipped: groups of keys whose lists of values are zipped (``search.zip``).
        when: key -> the condition ``parent=value[,value]`` under which it exists.
        variants: name -> overrides of a variant of an ablation.
        leave_one_out: overrides, each of which is a variant.

    Raises:
        UserError: for a space that is wrong; one line names the key and the remedy.

    """
    overrides = read_overrides([f"{key}={_text(key, value)}" for key, value in space.items()])
    typed = read_overrides(arguments)
    last = {_key(override): override for override in (*overrides, *typed)}
    swept = {key: override for key, override in last.items() if override.is_sweep_override()}
    fixed = {key: value_of(override) for key, override in last.items() if key not in swept}
    parameters = [_plain(override) for override in swept.values()]
    parameters = _zip_groups(parameters, zipped, fixed)
    if variants or leave_one_out:
        parameters.insert(0, _ablation(variants or {}, leave_one_out, swept))
    for parameter in parameters:
        _refuse_duplicates(parameter)
    parameters = _conditional(parameters, when or {}, fixed)
    given = [each for each in overrides if last[_key(each)] is each and _key(each) in fixed]
    places: dict[str, int] = {}
    for each in typed:
        if each.is_sweep_override():
            places[each.get_key_element()] = len(given)
        elif _key(each) in fixed:
            given.append(each)
    lines = [str(each.input_line) for each in given]
    return Space(tuple(parameters), lines, places, _order(typed))


def _order(typed: Sequence[Override]) -> tuple[str, ...]:
    """The keys whose order matters: those that set a whole mapping, and those within it."""
    keys = [(_key(each), "{" in str(each.input_line)) for each in typed]
    pairs = [
        (whole, key)
        for whole, is_mapping in keys
        for key, _ in keys
        if is_mapping and key.startswith(f"{whole}.")
    ]
    tied = {key for pair in pairs for key in pair}
    return tuple(key for key, _ in keys if key in tied)


def _text(key: str, value: Any) -> str:
    """The values of a key of the space as override text. A list is a choice."""
    if not isinstance(value, list):
        return as_text(value)
    if not value:
        raise UserError(f"search.space: {key} is an empty list; name its values")
    texts = [as_text(choice_text(each)) for each in value]
    return ",".join(texts) if len(texts) > 1 else f"choice({texts[0]})"  # choice() takes no null


def _key(override: Override) -> str:
    """The key of an override, without ``+`` or ``~``."""
    return override.get_key_element().lstrip("+~")


def _values(override: Override) -> tuple[str, ...]:
    """The values of a list or the single value of an override, as override text."""
    if not override.is_choice_sweep():
        return (value_of(override),)
    values = override.sweep_iterator(Transformer.identity)
    return tuple(as_text(choice_text(value)) for value in values)


def _plain(override: Override) -> Parameter:
    """The parameter of one key."""
    line, value = override.input_line, override.value()
    if getattr(value, "shuffle", False):
        raise UserError(f"{line}: leave shuffle(…) out; the sampler orders the points")
    if isinstance(value, IntervalSweep):
        _check_interval(str(line), value)
    elif tags := sorted(getattr(value, "tags", ())):
        key, tag = override.get_key_element(), tags[0]
        hint = nearest(tag, ["log"])
        raise UserError(
            f"{line}: only an interval has tags; for a log scale write "
            f"'{key}=tag(log, interval(a, b))', for whole numbers 'tag(log, int(interval(a, b)))'"
            + (f" ({tag}: {hint})" if tag != "log" else "")
        )
    try:
        distribution = compat.optuna_distribution(override)
    except (AssertionError, NotImplementedError) as error:
        raise UserError(f"{line}: cannot be searched; list the values with choice(…)") from error
    except ValueError as error:
        raise UserError(f"{line}: {error}") from error
    if isinstance(distribution, CategoricalDistribution):
        values: Sequence[Any] = distribution.choices
        if override.is_choice_sweep():
            values = list(map(choice_text, override.sweep_iterator(Transformer.identity)))
        distribution = _choices(values)
    return Parameter((override.get_key_element(),), distribution)


def _check_interval(line: str, value: IntervalSweep) -> None:
    """Raise UserError for wrong bounds, and for tags that Hydra would ignore."""
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
    """The distribution of choices, as texts where Optuna cannot compare or store the values."""
    finite = not any(isinstance(v, float) and not math.isfinite(v) for v in values)
    apart = len(set(values)) == len(values)
    return CategoricalDistribution(values if finite and apart else list(map(as_text, values)))


def _refuse_duplicates(parameter: Parameter) -> None:
    if isinstance(parameter.distribution, CategoricalDistribution):
        texts = [as_text(choice) for choice in parameter.distribution.choices]
        if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
            raise UserError(f"{parameter.name} lists {twice[0]} twice; name every value once")


def _zip_groups(
    parameters: list[Parameter], groups: Sequence[Sequence[str]], fixed: Mapping[str, str]
) -> list[Parameter]:
    """Merge the keys of each group into one parameter, at the place of the first."""
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
            _zip(members) if i == first else each
            for i, each in enumerate(parameters)
            if i == first or each not in members
        ]
    return parameters


def _zip(members: Sequence[Parameter]) -> Parameter:
    """Merge parameters: the first choice has the first value of each, and so on."""
    columns = [[as_text(each.exact(v)) for v in each.values()] for each in members]
    for (one, a), (two, b) in pairwise(zip(members, columns, strict=True)):
        if len(a) != len(b):
            raise UserError(
                f"search.zip: {one.name} has {len(a)} values and {two.name} {len(b)}; "
                "keys that move together need lists of equal length"
            )
    rows = list(zip(*columns, strict=True))
    names = [",".join(row) for row in rows]
    keys = tuple(each.name for each in members)
    distribution = CategoricalDistribution(names)
    return Parameter(keys, distribution, rows=dict(zip(names, rows, strict=True)))


def _ablation(
    variants: Mapping[str, Sequence[str]], leave_one_out: Sequence[str], swept: Iterable[str]
) -> Parameter:
    """The parameter of an ablation: the full model, the variants, and each part left out."""
    lines: dict[str, tuple[str, ...]] = {FULL: ()}
    for name, own in (*variants.items(), *((line, [line]) for line in leave_one_out)):
        place = f"search.ablation: {name}"
        if name in lines:
            raise UserError(f"{place} is there already; give every variant a name of its own")
        if not own:
            raise UserError(f"{place} changes nothing; that is '{FULL}', which is always there")
        if same := [other for other in lines if lines[other] == tuple(own)]:
            raise UserError(f"{place} changes the same as {same[0]}; keep one of them")
        for override in read_overrides(own):
            if override.is_sweep_override():
                raise UserError(f"{place}: {override.input_line}: a variant has one value a key")
            if _key(override) in swept:
                raise UserError(f"{place} sets {_key(override)}, which is swept; remove one")
        lines[name] = tuple(own)
    return Parameter((ABLATION,), CategoricalDistribution(list(lines)), lines=lines)


def _conditional(
    parameters: Sequence[Parameter], when: Mapping[str, str], fixed: Mapping[str, str]
) -> list[Parameter]:
    """Add conditions to parameters, and sort each after the one that it depends on."""
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
            raise UserError(f"search.when: {names} depend on each other; remove one condition")
        pending.remove(each)
        settled |= set(each.keys)
        if each.when is None or each.when.holds(there):
            ordered.append(replace(each, when=None))
        elif any(each.when.key in other.keys for other in ordered):
            ordered.append(each)
        # Otherwise its parent is fixed to another value, and it never exists.
    return ordered


def _condition(
    parameter: Parameter,
    when: Mapping[str, str],
    known: Mapping[str, Parameter],
    fixed: Mapping[str, str],
) -> Condition | None:
    """The condition of a parameter. Raises UserError when it can never hold."""
    said = {when.get(key) for key in parameter.keys}
    if len(said) > 1:
        raise UserError(f"search.when: {parameter.name} move together; give all one condition")
    if (text := said.pop()) is None:
        return None
    place = f"search.when: {parameter.name} where {text}"
    if "=" not in text:
        raise UserError(f"{place}: write it as key=value, or key=value,value")
    (override,) = read_overrides([text])
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
        if meaning(value) not in map(meaning, can_be):
            hint = nearest(value, can_be)
            raise UserError(f"{place}: {condition.key} is never {value}: {hint}")
    return condition
