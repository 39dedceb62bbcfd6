"""The grammar of a search space: valid text is parsed, invalid text is one line."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from stagesweep.base.errors import UserError
from stagesweep.sweep.space.grammar import parse

TREE = {"a": "choice(x, y)", "b": "choice(1, 2, 3)", "c": "range(0, 4)", "d": "choice(5, 6)"}

# ------------------------------------------------------------------------------ the grammar


def test_yaml_and_command_line_share_one_grammar() -> None:
    texts = {
        "lr": "tag(log, interval(1e-4, 1e-2))",
        "weight": "interval(0, 1)",
        "width": "range(8, 33, 8)",
        "beta": "range(0.0, 0.5, 0.1)",
        "model": "vae_base,vae_large",
        "depth": "int(interval(1, 4))",
    }
    expected = {
        "lr": FloatDistribution(1e-4, 1e-2, log=True),
        "weight": FloatDistribution(0.0, 1.0),
        "width": IntDistribution(8, 32, step=8),
        "beta": FloatDistribution(0.0, 0.4, step=0.1),
        "model": CategoricalDistribution(["vae_base", "vae_large"]),
        "depth": IntDistribution(1, 4),
    }
    assert parse(texts, []).distributions == expected
    typed = parse({}, [f"{key}={text}" for key, text in texts.items()])
    assert typed.distributions == expected
    assert typed.fingerprint() == parse(texts, []).fingerprint()


def test_the_command_line_wins() -> None:
    space = {"a": "choice(1, 2)", "b": "choice(1, 2)", "c": "choice(1, 2)", "d": "5"}
    both = parse(space, ["a=3", "b=7,8", "~c", "experiment=digits", "+e=1,2", "f='x y'"])
    assert list(both.distributions) == ["b", "+e"]
    assert both.distributions["b"] == CategoricalDistribution([7, 8])
    assert both.fixed == ["d=5", "a=3", "~c", "experiment=digits", "f='x y'"]
    assert parse(space, ["d=6"]).fixed == ["d=6"]
    assert parse({}, ["a=1", "a=1,2"]).fixed == []
    assert parse({}, ["a=1,2", "a=1"]).distributions == {}
    assert parse({}, ["a=1,2", "a=1"]).fixed == ["a=1"]


def test_an_override_stays_where_it_was_typed() -> None:
    """Of a key and its parent, the later wins; what was not typed comes last."""
    lists = {"m": "1,2"}
    space = parse(lists, ["s={x:1},{x:2}", "k=0", "s.x=5", "n=1,2"], variants={"no": ["~s.y"]})
    point = {"m": 1, "s": "{x:2}", "n": 2, "ablation": "no"}
    given = space.arguments(space.overrides(point))
    assert given == ["s={x:2}", "k=0", "s.x=5", "n=2", "~s.y", "m=1"]
    whole = space.arguments(space.overrides(point | {"ablation": "full"}))
    assert whole == ["s={x:2}", "k=0", "s.x=5", "n=2", "m=1"]


def test_values_keep_their_type() -> None:
    space = parse({"v": "null,true,1,nan,'a b',[1,2],1e-5"}, [])
    texts = [space.overrides(point)[0] for point in space.points(10)]
    assert texts == ["v=null", "v=true", "v=1", "v=nan", "v='a b'", "v=[1,2]", "v=1e-05"]
    json.dumps(list(space.points(10)))


def test_a_list_of_yaml_is_a_choice() -> None:
    values = ["a, b", "1e-3", 1, True, None, ["x y", 2], "${seed}", "interval(0, 1)"]
    space = parse({"v": values, "n": 5, "one": ["x"]}, [])
    texts = [space.overrides(point)[0] for point in space.points(10)]
    assert texts == [
        *("v='a, b'", "v='1e-3'", "v=1", "v=true", "v=null", "v=[x y,2]", "v=${seed}"),
        "v='interval(0, 1)'",
    ]
    assert space.fixed == ["n=5"]


# ------------------------------------------------------------------------------ zipped


def test_zipped_keys_move_together() -> None:
    lists = {"a.lr": "1e-3,1e-2", "seed": "range(0, 3)", "b.lr": "choice(0.1, 0.2)"}
    space = parse(lists, [], zipped=[["a.lr", "b.lr"]])
    assert space.distributions == {
        "a.lr,b.lr": CategoricalDistribution(["0.001,0.1", "0.01,0.2"]),
        "seed": IntDistribution(0, 2),
    }
    points = [space.overrides(point) for point in space.points(10)]
    assert points == [
        [f"a.lr={a}", f"b.lr={b}", f"seed={seed}"]
        for a, b in (("0.001", "0.1"), ("0.01", "0.2"))
        for seed in range(3)
    ]


def test_a_zipped_list_may_repeat_a_value() -> None:
    space = parse({"a": "1,1,2", "b": "x,y,y", "c": "range(3)"}, [], zipped=[["a", "b", "c"]])
    assert [space.overrides(p) for p in space.points(10)] == [
        ["a=1", "b=x", "c=0"],
        ["a=1", "b=y", "c=1"],
        ["a=2", "b=y", "c=2"],
    ]


def test_a_group_that_is_fixed_is_no_longer_zipped() -> None:
    space = parse({"a": "1,2", "b": "3,4"}, ["a=1", "b=3"], zipped=[["a", "b"]])
    assert space.distributions == {}


# ------------------------------------------------------------------------------ ablation


def test_an_ablation_begins_with_the_full_model() -> None:
    space = parse(
        {},
        ["seed=0"],
        variants={"no_contrastive": ["stage.joint.loss.contrastive.weight=0", "stage.x=1"]},
        leave_one_out=["~stage.joint.loss.kl", "loss.smoothness.count=3"],
    )
    names = ["full", "no_contrastive", "~stage.joint.loss.kl", "loss.smoothness.count=3"]
    assert space.distributions == {"ablation": CategoricalDistribution(names)}
    assert [space.overrides(p) for p in space.points(9)] == [
        [],
        ["stage.joint.loss.contrastive.weight=0", "stage.x=1"],
        ["~stage.joint.loss.kl"],
        ["loss.smoothness.count=3"],
    ]
    assert space.fixed == ["seed=0"]


def test_an_ablation_of_each_point() -> None:
    space = parse({"b": "1,2"}, [], leave_one_out=["v=0"])
    assert [space.overrides(p) for p in space.points(9)] == [
        ["b=1"],
        ["b=2"],
        ["v=0", "b=1"],
        ["v=0", "b=2"],
    ]


# ------------------------------------------------------------------------------ errors

ERRORS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any], str]] = {
    "unreadable": (
        {"lr": "interval(0, 1"},
        {},
        "cannot read 'lr=interval(0, 1': no viable alternative at input 'interval(0, 1'",
    ),
    "unknown tag": (
        {"lr": "tag(lgo, interval(1, 2))"},
        {},
        "lr=tag(lgo, interval(1, 2)): unknown tag 'lgo': did you mean 'log'?",
    ),
    "upside down": (
        {"lr": "interval(2, 1)"},
        {},
        "lr=interval(2, 1): the interval starts above its end; swap them",
    ),
    "endless": (
        {"lr": "interval(0, inf)"},
        {},
        "lr=interval(0, inf): the ends of an interval must be finite",
    ),
    "log of zero": (
        {"lr": "tag(log, interval(0, 1))"},
        {},
        "lr=tag(log, interval(0, 1)): a log scale has no zero; start the interval above it",
    ),
    "empty range": (
        {"n": "range(5, 1)"},
        {},
        "n=range(5, 1): An Optuna range sweep must contain at least one value.",
    ),
    "shuffled": (
        {"n": "shuffle(range(1, 4))"},
        {},
        "n=shuffle(range(1, 4)): leave shuffle(…) out; the sampler orders the points",
    ),
    "glob": (
        {"model": "glob(*)"},
        {},
        "model=glob(*): cannot be searched; list the values with choice(…)",
    ),
    "a tag of a range": (
        {"n": "tag(log, range(1, 9))"},
        {},
        "n=tag(log, range(1, 9)): only an interval has tags; for a log scale write "
        "'n=tag(log, interval(a, b))', for whole numbers 'tag(log, int(interval(a, b)))'",
    ),
    "a misspelt tag of a list": (
        {"n": "tag(lgo, choice(1, 2))"},
        {},
        "n=tag(lgo, choice(1, 2)): only an interval has tags; for a log scale write "
        "'n=tag(log, interval(a, b))', for whole numbers 'tag(log, int(interval(a, b)))' "
        "(lgo: did you mean 'log'?)",
    ),
    "an empty list": (
        {"n": []},
        {},
        "search.space: n is an empty list; name its values",
    ),
    "twice": ({"n": "1,2,1"}, {}, "n lists 1 twice; name every value once"),
    "zip: unequal": (
        {"a": "1,2", "b": "1,2,3"},
        {"zipped": [["a", "b"]]},
        "search.zip: a has 2 values and b 3; keys that move together need lists of equal length",
    ),
    "zip: unknown": (
        {"alpha": "1,2", "b": "1,2"},
        {"zipped": [["alhpa", "b"]]},
        "search.zip: alhpa is not swept by itself: did you mean 'alpha'?",
    ),
    "zip: in two groups": (
        {"a": "1,2", "b": "1,2", "c": "1,2"},
        {"zipped": [["a", "b"], ["a", "c"]]},
        "search.zip: a is not swept by itself: there are a,b, c",
    ),
    "zip: alone": (
        {"a": "1,2"},
        {"zipped": [["a"]]},
        "search.zip: a is alone; a group names two or more keys",
    ),
    "zip: continuous": (
        {"a": "1,2", "b": "interval(0, 1)"},
        {"zipped": [["a", "b"]]},
        "b=interval(0.0, 1.0): its values cannot be listed; name them with choice(…) or "
        "range(from, to, step), or search it with search=random",
    ),
    "zip: twice": (
        {"a": "1,1", "b": "2,2"},
        {"zipped": [["a", "b"]]},
        "a,b lists 1,2 twice; name every value once",
    ),
    "when: unknown key": (
        TREE,
        {"when": {"bb": "a=x"}},
        "search.when: bb is not swept: did you mean 'b'?",
    ),
    "when: unknown parent": (
        TREE,
        {"when": {"b": "model=x"}},
        "search.when: b where model=x: model is neither swept nor set: there are a, c, d",
    ),
    "when: no such value": (
        {"model": "vae_base,vae_large", "b": "1,2"},
        {"when": {"b": "model=vae_lrge"}},
        "search.when: b where model=vae_lrge: model is never vae_lrge: did you mean 'vae_large'?",
    ),
    "when: continuous parent": (
        {"a": "interval(0, 1)", "b": "1,2"},
        {"when": {"b": "a=0.5"}},
        "search.when: b where a=0.5: a is continuous; a condition needs a choice(…)",
    ),
    "when: a circle": (
        TREE,
        {"when": {"a": "b=1", "b": "a=x"}},
        "search.when: a and b depend on each other; remove one condition",
    ),
    "when: not a condition": (
        TREE,
        {"when": {"b": "a"}},
        "search.when: b where a: write it as key=value, or key=value,value",
    ),
    "when: zipped apart": (
        TREE | {"e": "1,2,3"},
        {"when": {"b": "a=x"}, "zipped": [["b", "e"]]},
        "search.when: b,e move together; give all one condition",
    ),
    "ablation: name taken": (
        {},
        {"variants": {"full": ["a=1"]}},
        "search.ablation: full is there already; give every variant a name of its own",
    ),
    "ablation: nothing": (
        {},
        {"variants": {"none": []}},
        "search.ablation: none changes nothing; that is 'full', which is always there",
    ),
    "ablation: the same": (
        {},
        {"variants": {"no_kl": ["kl=0"]}, "leave_one_out": ["kl=0"]},
        "search.ablation: kl=0 changes the same as no_kl; keep one of them",
    ),
    "ablation: swept": (
        {"kl": "1,2"},
        {"leave_one_out": ["kl=0"]},
        "search.ablation: kl=0 sets kl, which is swept; remove one",
    ),
    "ablation: several values": (
        {},
        {"leave_one_out": ["kl=0,1"]},
        "search.ablation: kl=0,1: kl=0,1: a variant has one value a key",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_invalid_space_is_one_line(case: str) -> None:
    space, more, line = ERRORS[case]
    with pytest.raises(UserError) as error:
        parse(space, [], **more)
    assert str(error.value) == line
