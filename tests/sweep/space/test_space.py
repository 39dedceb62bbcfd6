"""The search space: what it proposes lies in it, a grid has every point once, errors name keys."""

import json
from itertools import product
from typing import Any

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from stagesweep.base.errors import UserError
from stagesweep.sweep.space.grammar import parse
from stagesweep.sweep.space.parameter import describe
from stagesweep.sweep.space.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)

TREE = {"a": "choice(x, y)", "b": "choice(1, 2, 3)", "c": "range(0, 4)", "d": "choice(5, 6)"}
WHEN = {"b": "a=x", "d": "b=2,3"}


def suggested(space: Space, sampler: optuna.samplers.BaseSampler, n: int) -> list[Any]:
    """Parameters and overrides of the first points that a sampler proposes."""
    study = optuna.create_study(sampler=sampler)
    found = []
    for i in range(n):
        trial = study.ask()
        overrides = space.suggest(trial)
        found.append((trial.params, overrides))
        study.tell(trial, float(i % 5))
    return found


def settings_of(overrides: list[str]) -> dict[str, Any]:
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {each.get_key_element(): each.value() for each in parsed}


# ------------------------------------------------------------------------------ conditions


def test_a_parameter_exists_where_its_condition_holds() -> None:
    space = parse(TREE, [], when=WHEN)
    points = list(space.points(100))
    assert len(points) == space.size() == 4 * (1 + 1 + 2 + 2)
    assert {tuple(p) for p in points} == {("a", "b", "c", "d"), ("a", "b", "c"), ("a", "c")}
    for params, overrides in suggested(space, optuna.samplers.RandomSampler(seed=0), 40):
        assert ("b" in params) == (params["a"] == "x")
        assert ("d" in params) == (params.get("b") in (2, 3))
        assert len(overrides) == len(params)


def test_a_condition_may_depend_on_a_fixed_zipped_or_ablation_key() -> None:
    assert "b" in parse(TREE, ["a=x"], when=WHEN).distributions
    gone = parse(TREE, ["a=y"], when=WHEN)
    assert list(gone.distributions) == ["c"]
    assert gone.size() == 4
    free = parse(TREE, ["b=2"], when=WHEN)
    assert free.size() == 2 * 4 * 2
    zipped = parse(TREE, [], when={"c": "a=x"}, zipped=[["a", "d"]])
    assert zipped.size() == 3 * (4 + 1)
    removed = parse({"w": "1,2"}, [], when={"w": "ablation=full"}, leave_one_out=["v=0"])
    assert [removed.overrides(p) for p in removed.points(9)] == [["w=1"], ["w=2"], ["v=0"]]


def test_zipped_keys_may_share_a_condition() -> None:
    space = parse(TREE | {"e": "7,8,9"}, [], zipped=[["b", "e"]], when={"b": "a=x", "e": "a=x"})
    assert space.size() == (3 + 1) * 4 * 2


# ------------------------------------------------------------------------------ named points


def test_an_enqueued_point_is_read_as_the_study_stores_it() -> None:
    lists = {
        "a": "1,2",
        "b": "x,'y z'",
        "lr": "interval(0, 1)",
        "n": "range(0, 9, 2)",
        "t": "true,null",
    }
    space = parse(lists, [], zipped=[["a", "b"]])
    named = {"a": 2, "b": "'y z'", "lr": 0.5, "n": 4, "t": None}
    params = space.point(named)
    assert params == {"a,b": "2,'y z'", "lr": 0.5, "n": 4, "t": "null"}
    assert type(params["n"]) is int
    assert space.overrides(params) == ["a=2", "b='y z'", "lr=0.5", "n=4", "t=null"]
    assert space.point({"t": True, "lr": "1e-3"}) == {"t": True, "lr": 0.001}


@pytest.mark.parametrize(
    ("values", "given", "override"),
    [
        ("'a b.csv','c,d=ü.csv'", "c,d=ü.csv", "k='c,d=ü.csv'"),
        ("'a b.csv','c,d=ü.csv'", "'c,d=ü.csv'", "k='c,d=ü.csv'"),
        ("plateau,cosine", "'plateau'", "k=plateau"),
        ("'plateau','cosine'", "plateau", "k='plateau'"),
        ("1e-3,1", "0.001", "k=0.001"),
        ("1,'1'", "1", "k='1'"),
        ("1,'1'", 1, "k=1"),
        ("1,true", True, "k=true"),
        ("[1,2],['a b',c]", ["a b", "c"], "k=['a b',c]"),
        ("[1,2],['a b',c]", "[1, 2]", "k=[1,2]"),
        ("{a:1},{a:null}", {"a": None}, "k={a:null}"),
        ("${seed},1", "${seed}", "k=${seed}"),
        ('"\'",x', "'", 'k="\'"'),
    ],
)
def test_a_named_point_may_be_quoted_text_or_a_list(
    values: str, given: object, override: str
) -> None:
    space = parse({}, [f"k={values}"])
    assert space.overrides(space.point({"k": given})) == [override]


# ------------------------------------------------------------------------------ grids


def test_a_grid_lists_its_values_and_has_a_cap() -> None:
    continuous = parse({"lr": "tag(log, interval(1e-4, 1e-2))", "n": "1,2"}, [])
    assert continuous.size() is None
    with pytest.raises(UserError, match=r"^lr=tag\(log, interval\(0\.0001, 0\.01\)\): its values "):
        continuous.points(10)
    large = parse(dict.fromkeys("abcd", "range(0, 1000)"), [])
    assert large.size() == 10**12
    with pytest.raises(UserError) as error:
        large.points(1000)
    assert str(error.value) == (
        "this grid has 1,000,000,000,000 points, more than search.max_points=1000; sweep fewer "
        "values, or allow it with search.max_points=1000000000000"
    )


POINT_ERRORS = {
    "unknown key": ({"lrr": 1}, "'lrr' is not in the space: did you mean 'lr'?"),
    "outside": ({"lr": 2}, "lr=2 is not in the space; it is lr=interval(0.0, 1.0)"),
    "between": ({"n": 3}, "n=3 is not in the space; it is n=range(0, 9, 2)"),
    "no number": ({"n": "x"}, "n=x is not in the space; it is n=range(0, 9, 2)"),
    "no choice": ({"a": 1, "b": "q"}, "a,b=1,q is not in the space; it is a,b=choice(1,x, 2,y)"),
    "half of a group": ({"a": 1}, "a moves with the others of a,b; set them all"),
}


@pytest.mark.parametrize("case", POINT_ERRORS)
def test_an_enqueued_point_outside_the_space_is_one_line(case: str) -> None:
    named, line = POINT_ERRORS[case]
    lists = {"a": "1,2", "b": "x,y", "lr": "interval(0, 1)", "n": "range(0, 9, 2)"}
    with pytest.raises(UserError) as error:
        parse(lists, [], zipped=[["a", "b"]]).point(named)
    assert str(error.value) == line


# ------------------------------------------------------------------------------ a changed space


def test_each_change_is_one_line() -> None:
    before = parse({"a": "1,2", "b": "x,y", "lr": "interval(0, 1)"}, [], leave_one_out=["v=0"])
    after = parse({"a": "1,3", "b": "x,y", "n": "range(3)"}, [], when={"n": "b=x"})
    assert before.difference(before.fingerprint()) == []
    assert after.difference(before.fingerprint()) == [
        "ablation: choice(full, v=0) is gone",
        "ablation full:  is gone",
        "ablation v=0: v=0 is gone",
        "lr: interval(0.0, 1.0) is gone",
        "n: range(0, 3) where b=x is new",
        "a: was choice(1, 2), is choice(1, 3)",
    ]


# ------------------------------------------------------------------------------ properties

WORDS = st.text("abcxyz_", min_size=1, max_size=5)
NUMBERS = st.integers(-50, 50) | st.floats(-10, 10, allow_nan=False).map(lambda v: round(v, 3))


@st.composite
def choices(draw: DrawFn) -> str:
    values = draw(st.lists(WORDS | NUMBERS, min_size=1, max_size=4, unique_by=(str, hash)))
    return f"choice({', '.join(map(str, values))})"


@st.composite
def ranges(draw: DrawFn) -> str:
    start, count = draw(st.integers(-20, 20)), draw(st.integers(1, 5))
    if draw(st.booleans()):
        step = draw(st.integers(1, 5))
        return f"range({start}, {start + (count - 1) * step + 1}, {step})"
    return f"range({start / 10}, {(start + count) / 10}, 0.1)"


@st.composite
def intervals(draw: DrawFn) -> str:
    start, width = draw(st.integers(1, 50)), draw(st.integers(0, 50))
    inner = f"interval({start}, {start + width})"
    inner = f"int({inner})" if draw(st.booleans()) else inner
    return f"tag(log, {inner})" if draw(st.booleans()) else inner


Arguments = dict[str, Any]


@st.composite
def spaces(draw: DrawFn, texts: SearchStrategy[str]) -> Arguments:
    """What makes a space: parameters, of which some depend on the first and two are zipped."""
    space = {f"k{i}": draw(texts) for i in range(draw(st.integers(1, 4)))}
    space = {"parent": draw(choices()), **space}
    parent = parse({"parent": space["parent"]}, [])
    values = [line.partition("=")[2] for p in parent.points(9) for line in parent.overrides(p)]
    dependent = draw(st.lists(st.sampled_from(sorted(set(space) - {"parent"})), unique=True))
    when = {key: f"parent={draw(st.sampled_from(values))}" for key in dependent}
    together = []
    if draw(st.booleans()):
        space |= {"za": "choice(1, 1, 2)", "zb": "choice(p, q, q)"}
        together = [["za", "zb"]]
    removed = draw(st.sampled_from([[], ["~gone", "off=0"]]))
    return {
        "space": space,
        "arguments": [],
        "when": when,
        "zipped": together,
        "leave_one_out": removed,
    }


LISTED = choices() | ranges()
ANY = LISTED | intervals()


def equal(one: str, other: str) -> bool:
    """Whether two texts are one value: a condition on 0 holds for 0.0, too."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


@given(spaces(LISTED))
@settings(max_examples=40, deadline=None)
def test_a_grid_has_each_active_combination_once(arguments: Arguments) -> None:
    space = parse(**arguments)
    points = list(space.points(10**9))
    assert len(points) == space.size()
    assert len({space.key(point) for point in points}) == len(points)
    # Against the plain product of all values, with what is inactive taken out of each.
    grid = space.grid()
    expected = set()
    for values in product(*grid.values()):
        params = dict(zip(grid, values, strict=True))
        for key, condition in arguments["when"].items():
            if not equal(str(params["parent"]), condition.partition("=")[2]):
                params.pop(key)
        expected.add(tuple(sorted((k, repr(v)) for k, v in params.items())))
    assert {tuple(sorted((k, repr(v)) for k, v in p.items())) for p in points} == expected


@given(spaces(ANY), st.sampled_from(["random", "tpe", "qmc"]), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_suggested_point_lies_in_the_space(
    arguments: Arguments, sampler: str, seed: int
) -> None:
    space = parse(**arguments)
    samplers: dict[str, optuna.samplers.BaseSampler] = {
        "random": optuna.samplers.RandomSampler(seed=seed),
        "tpe": optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=3, multivariate=True, constant_liar=True
        ),
        "qmc": optuna.samplers.QMCSampler(seed=seed, scramble=True),
    }
    for params, overrides in suggested(space, samplers[sampler], 8):
        assert space.overrides(params) == overrides
        for name, value in params.items():
            distribution = space.distributions[name]
            internal = distribution.to_internal_repr(value)
            assert distribution.to_external_repr(internal) == value
        parent = str(params["parent"])
        inactive = {
            key
            for key, condition in arguments["when"].items()
            if not equal(parent, condition.partition("=")[2])
        }
        assert set(params) == set(space.distributions) - inactive
        named = settings_of([line for line in overrides if not line.startswith(("~", "off"))])
        plain = {key: value for key, value in named.items() if not isinstance(value, list)}
        assert space.key(params) == space.key(params | space.point(plain))


@given(spaces(ANY))
@settings(max_examples=40, deadline=None)
def test_a_space_can_be_read_from_its_description(arguments: Arguments) -> None:
    one, two = parse(**arguments), parse(**arguments)
    assert one == two
    plain = {k: d for k, d in one.distributions.items() if k.startswith(("k", "parent"))}
    assert parse({k: describe(d) for k, d in plain.items()}, []).distributions == plain
    turned = dict(reversed(arguments["space"].items()))
    assert parse(**(arguments | {"space": turned})).fingerprint() == one.fingerprint()


@given(spaces(ANY), spaces(ANY))
@settings(max_examples=40, deadline=None)
def test_fingerprints_are_equal_for_equal_spaces_only(one: Arguments, two: Arguments) -> None:
    first, second = parse(**one), parse(**two)

    def parts(space: Space) -> dict[str, Any]:
        return {p.name: (p.distribution, str(p.when), p.lines) for p in space.parameters}

    assert (first.fingerprint() == second.fingerprint()) == (parts(first) == parts(second))
    assert bool(first.difference(second.fingerprint())) == (parts(first) != parts(second))
    assert json.loads(json.dumps(first.fingerprint())) == first.fingerprint()


@pytest.mark.parametrize("name", ["grid", "gp", "nsga2"])
def test_other_samplers_take_a_space_with_conditions(name: str) -> None:
    space = parse(TREE | {"lr": "tag(log, interval(1e-3, 1))"}, [], when=WHEN)
    samplers: dict[str, optuna.samplers.BaseSampler] = {
        "grid": optuna.samplers.GridSampler(parse(TREE, []).grid()),
        "gp": optuna.samplers.GPSampler(
            seed=0, n_startup_trials=3, warn_independent_sampling=False
        ),
        "nsga2": optuna.samplers.NSGAIISampler(seed=0, population_size=3),
    }
    if name == "grid":
        space = parse(TREE, [])
    assert len(suggested(space, samplers[name], 6)) == 6


@pytest.mark.parametrize(
    ("values", "condition"),
    [
        ("plateau,cosine", "a='plateau'"),
        ("'plateau',cosine", "a=plateau"),
        ("1e-3,1", "a=0.001"),
        ("true,false", "a=True"),
    ],
)
def test_a_condition_compares_values_not_spellings(values: str, condition: str) -> None:
    space = parse({"a": values, "b": "1,2"}, [], when={"b": condition})
    assert space.size() == 3
