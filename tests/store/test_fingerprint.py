import importlib.machinery
import subprocess
import sys
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.store.fingerprint import fingerprint, freeze, source_hash, sources

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
)
plain = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
mappings = st.dictionaries(st.text(max_size=2), plain, min_size=1, max_size=3)


def of(value: object) -> str:
    return fingerprint({"x": value}, [], None)


def same(a: Any, b: Any) -> bool:
    """Whether two values must have the same fingerprint: an independent reference."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


# ---------------------------------------------------------------------------- values


@settings(max_examples=50)
@given(plain, plain)
def test_fingerprints_differ_exactly_where_values_do(a: Any, b: Any) -> None:
    assert (of(a) == of(b)) == same(a, b)


@settings(max_examples=50)
@given(mappings, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    assert of(value) == of({key: value[key] for key in keys})


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key], (*path, key))]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, (*path, i))]
    return [path]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = value.copy()
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


@settings(max_examples=50)
@given(mappings, scalars, st.data())
def test_any_changed_value_changes_the_fingerprint(
    value: dict[str, Any], new: Any, data: st.DataObject
) -> None:
    places = leaves(value)
    assume(places)
    changed = replaced(value, data.draw(st.sampled_from(places)), new)
    assume(not same(changed, value))
    assert of(changed) != of(value)


def test_inputs_modules_and_previous_all_count() -> None:
    base = fingerprint({"a": 1}, [], None)
    others = [
        fingerprint({"a": 2}, [], None),
        fingerprint({"a": 1}, ["stagesweep.base.errors"], None),
        fingerprint({"a": 1}, ["stagesweep.base.spec"], None),
        fingerprint({"a": 1}, [], base),
    ]
    assert len({base, *others}) == 5
    assert len(base) == 32
    assert set(base) <= set("0123456789abcdef")


class Colour(StrEnum):
    red = "red"


class Number(Enum):
    one = 1


def test_kinds_of_values() -> None:
    assert of(Colour.red) == of("red")
    assert of(Number.one) == of(1)
    assert of({Colour.red: 1}) == of({"red": 1})
    assert of((1, 2)) == of([1, 2])
    assert of(np.float64(0.1)) == of(0.1)
    assert of(float("nan")) == of(float("nan"))
    kinds = [1, 1.0, True, "1", None, "null", [], {}, [[]], {"": {}}, {1: 2}, {"1": 2}, 0.0, -0.0]
    assert len({of(kind) for kind in kinds}) == len(kinds)


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    code = (
        "from stagesweep.store.fingerprint import fingerprint;"
        "print(fingerprint({'b': {'x', }.pop(), 'a': [0.1, None]},"
        " ['stagesweep.store.store'], 'p'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
    ).stdout.strip()
    assert found == fingerprint({"a": [0.1, None], "b": "x"}, ["stagesweep.store.store"], "p")


@pytest.mark.parametrize("value", [np.zeros(2), {1, 2}, b"x", Path("x"), object(), np.int64(1)])
def test_values_that_are_not_plain_are_named(value: object) -> None:
    with pytest.raises(UserError, match=rf"^model\.depth is a {type(value).__name__}, which "):
        fingerprint({"model": {"depth": value}}, [], None)


# ---------------------------------------------------------------------------- code

BASE = {
    "mine/__init__.py": "",
    "mine/model.py": "from .parts import layer\nclass Net:\n    depth = layer.DEPTH\n",
    "mine/parts/__init__.py": "",
    "mine/parts/layer.py": "def build():\n    import mine.deep\n    return mine.deep.x\n",
    "mine/deep.py": "x = 1\n",
    "mine/unused.py": "y = 1\n",
}

Write = Callable[[dict[str, str]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write source files below a folder of their own that is on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    write(BASE)
    return write


def test_indirect_imports_are_found(write: Write) -> None:
    reached = {"mine", "mine.model", "mine.parts", "mine.parts.layer", "mine.deep"}
    assert sources(["mine.model"]).keys() == reached
    assert sources(["mine.model.Net"]) == sources(["mine.model"])


@pytest.mark.parametrize("name", ["mine/__init__.py", "mine/parts/__init__.py", "mine/deep.py"])
def test_a_change_in_reached_code_counts(write: Write, name: str) -> None:
    before = source_hash("mine.model")
    write({name: "x = 2\n"})
    assert source_hash("mine.model") != before


def test_a_change_elsewhere_does_not(write: Write) -> None:
    before = source_hash("mine.model")
    write({"mine/unused.py": "y = 2\n", "mine/new.py": "z = 3\n"})
    assert source_hash("mine.model") == before


def test_comments_and_docstrings_do_not_count(write: Write) -> None:
    before = source_hash("mine.model")
    write(
        {
            "mine/__init__.py": '"""A package."""\n\n__version__ = "2.0"\n',
            "mine/model.py": (
                "# A comment.\nfrom .parts import (\n    layer,\n)\n\n\n"
                'class Net:\n    """Doc."""\n\n    depth = (layer.DEPTH)  # more\n    "Doc."\n'
            ),
        }
    )
    assert source_hash("mine.model") == before


def test_imports_for_the_type_checker_do_not_count(write: Write) -> None:
    write({"mine/a.py": "import typing\nif typing.TYPE_CHECKING:\n    from mine import deep\n"})
    assert sources(["mine.a"]).keys() == {"mine", "mine.a"}


@pytest.mark.parametrize(
    "line",
    [
        "import mine.deep",
        "import mine.deep as d, json",
        "from mine import deep",
        "from mine import unknown, deep as d",
        "from . import deep",
        "from .deep import x",
        "from mine.deep import *",
        "def f():\n    from .deep import x",
        "try:\n    from .deep import x\nexcept ImportError:\n    x = 0",
        "class A:\n    if True:\n        from .deep import x",
    ],
)
def test_every_way_to_import(write: Write, line: str) -> None:
    write({"mine/a.py": line})
    assert "mine.deep" in sources(["mine.a"])


def test_relative_imports_from_a_package_file(write: Write) -> None:
    write({"mine/parts/__init__.py": "from .layer import build\nfrom ..deep import x\n"})
    assert {"mine.parts.layer", "mine.deep"} <= sources(["mine.parts"]).keys()


def test_circular_imports_end(write: Write) -> None:
    write({"mine/deep.py": "import mine.model\n"})
    assert "mine.deep" in sources(["mine.model"])


def test_code_is_never_executed(write: Write) -> None:
    write({"mine/__init__.py": "raise SystemExit\n", "mine/deep.py": "raise SystemExit\n"})
    sources(["mine.model"])
    assert not [name for name in sys.modules if name.partition(".")[0] == "mine"]


def test_imported_code_can_be_frozen(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagesweep.store.fingerprint._frozen", {})
    write({"mine/parts/layer.py": "DEPTH = 1\ndef build():\n    import mine.deep\n"})
    importlib.import_module("mine.model")
    try:
        before = sources(["mine.model"])
        freeze(["mine.model"])
        write({"mine/model.py": "z = 1\n", "mine/parts/layer.py": "import mine.deep\nz = 1\n"})
        assert sources(["mine.model"]) == before
        write({"mine/deep.py": "x = 2\n"})  # not in memory: whoever imports it runs the new one
        changed = {name for name, code in sources(["mine.model"]).items() if code != before[name]}
        assert changed == {"mine.deep"}
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]


def test_folders_without_init_are_packages_too(write: Write) -> None:
    write({"mine/open/inner/part.py": "from mine import deep\n", "loose/one.py": "import mine"})
    assert {"mine.open.inner.part", "mine.deep"} <= sources(["mine.open.inner.part.Thing"]).keys()
    assert {"loose.one", "mine"} <= sources(["loose.one"]).keys()


def test_a_helper_beside_the_package_counts_by_its_source(write: Write) -> None:
    write({"mine/a.py": "import helper_beside\n", "helper_beside.py": "x = 1\n"})
    before = source_hash("mine.a")
    write({"helper_beside.py": "x = 2\n"})
    assert source_hash("mine.a") != before


def test_an_optional_import_counts_once_it_is_installed(write: Write) -> None:
    write({"mine/a.py": "try:\n    import sometimes_there\nexcept ImportError:\n    pass\n"})
    assert sources(["mine.a"])["sometimes_there"] == "absent"
    write({"sometimes_there.py": "x = 1\n"})
    assert sources(["mine.a"])["sometimes_there"] != "absent"


@pytest.mark.parametrize(
    ("requires", "by_version"),
    [("numpy", True), ("stagesweep-like>=1", True), ("stagesweep>=0.1", False)],
)
def test_installed_packages_count_by_version_unless_they_build_on_this_one(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    requires: str,
    by_version: bool,
) -> None:
    name = "installed_" + "".join(filter(str.isalnum, requires))
    info = f"site-packages/some_{name}-1.2.dist-info"
    metadata = (
        f"Metadata-Version: 2.1\nName: some-{name}\nVersion: 1.2\nRequires-Dist: {requires}\n"
    )
    write(
        {
            f"site-packages/{name}/__init__.py": "",
            f"site-packages/{name}/net.py": "import json\n",
            f"{info}/METADATA": metadata,
            f"{info}/top_level.txt": name,
        }
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    found = sources([f"{name}.net.Net"])
    if by_version:
        assert found == {name: f"some-{name}==1.2"}
    else:
        assert found.keys() == {name, f"{name}.net"}


def test_libraries_count_by_version_and_python_not_at_all() -> None:
    found = sources(["sklearn.cluster.KMeans", "hypothesis", "math", "os.path.join", "tqdm.tqdm"])
    assert found.keys() == {"sklearn", "hypothesis"}
    assert found["sklearn"].startswith("scikit-learn==")


def test_own_code_counts_except_modules_that_change_no_result() -> None:
    found = sources(["stagesweep.base.view"])
    assert {"stagesweep", "stagesweep.base.view", "stagesweep.base.spec"} <= found.keys()
    assert "stagesweep.base.errors" not in found


@pytest.mark.parametrize("name", ["no_such_package.Net", "no_such_package"])
def test_a_missing_module_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^no module for '{name}': check its spelling"):
        sources([name])


def test_code_that_does_not_parse_is_named_with_its_line(write: Write) -> None:
    write({"mine/deep.py": "x = 1\ny = = 2\n"})
    with pytest.raises(UserError, match=r"mine/deep\.py:2 is not valid Python: .*; correct it$"):
        sources(["mine.model"])


def test_compiled_modules_count_by_their_bytes(write: Write, tmp_path: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    write({"mine/a.py": "from mine import fast\n", f"mine/fast{suffix}": "one"})
    before = sources(["mine.a"])
    write({f"mine/fast{suffix}": "two"})
    after = sources(["mine.a"])
    assert {name for name in after if after[name] != before[name]} == {"mine.fast"}


def test_the_store_needs_no_torch(needs_torch: Callable[[str], bool]) -> None:
    assert not needs_torch(
        "from stagesweep.store import command, fingerprint, store;"
        "fingerprint.sources(['stagesweep.base.view', 'torch.optim.AdamW'])"
    )
