"""Private names of Hydra, Optuna and torch: a failure here says what upstream has changed."""

import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

from stagesweep.base import compat


def test_compat_imports_nothing_heavy(needs_torch: Callable[[str], bool]) -> None:
    assert not needs_torch("import stagesweep.base.compat")


def test_optimizer_imports() -> None:
    # Optimizer.add_param_group and step are wrapped by torch._disable_dynamo, which imports it.
    wrapper = inspect.getsource(import_module("torch._compile"))
    assert f"import {compat.OPTIMIZER_IMPORTS}" in wrapper, (
        f"torch._compile no longer imports {compat.OPTIMIZER_IMPORTS} when an optimizer is built; "
        "OPTIMIZER_IMPORTS must name what it imports instead"
    )
    assert find_spec(compat.OPTIMIZER_IMPORTS) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's own")
def test_die_with_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        if not os.fork():
            compat.die_with_parent(signal.SIGKILL)
            os.write(write, str(os.getpid()).encode())
            time.sleep(60)
        time.sleep(60)
        os._exit(0)
    child = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + 30
    while _alive(child):
        assert time.monotonic() < until, (
            "torch.multiprocessing._prctl_pr_set_pdeathsig no longer ends a process with its parent"
        )
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_default_store() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=9))
    try:
        compat.default_store().set("key", "value")
        assert compat.default_store().get("key") == b"value", (
            "torch.distributed.distributed_c10d._get_default_store no longer returns the store of "
            "the default process group"
        )
    finally:
        dist.destroy_process_group()


def test_optuna_tables() -> None:
    from optuna.trial import TrialState

    columns = {
        "StudyUserAttributeModel": {"study_id", "key", "value_json"},
        "StudySystemAttributeModel": {"study_id", "key", "value_json"},
        "TrialModel": {"trial_id", "study_id", "number", "state", "datetime_start"}
        | {"datetime_complete"},
        "TrialParamModel": {"trial_id", "param_name", "param_value", "distribution_json"},
        "TrialUserAttributeModel": {"trial_id", "key", "value_json"},
        "TrialSystemAttributeModel": {"trial_id", "key", "value_json"},
        "TrialValueModel": {"trial_id", "objective", "value", "value_type"},
        "TrialIntermediateValueModel": {"trial_id", "step", "intermediate_value"}
        | {"intermediate_value_type"},
    }
    tables = compat.optuna_tables()
    for name, wanted in columns.items():
        table = getattr(tables, name, None)
        assert table is not None, f"optuna.storages._rdb.models has no {name} any more"
        found = {column.name for column in table.__table__.columns}
        keys = {column.name for column in table.__table__.primary_key}
        assert wanted <= found, f"{name} of Optuna has lost columns: {wanted - found}"
        required = {c.name for c in table.__table__.columns if not c.nullable and c.default is None}
        new = required - wanted - keys
        assert not new, f"{name} of Optuna has new columns that need a value: {new}"
    assert tables.TrialModel.__table__.columns["state"].type.enum_class is TrialState, (
        "Optuna stores the state of a trial in another way"
    )
    stored, kind = tables.TrialValueModel.value_to_stored_repr(float("inf"))
    assert kind.name == "INF_POS", "Optuna stores infinite values in another way"
    stored, kind = tables.TrialIntermediateValueModel.intermediate_value_to_stored_repr(
        float("nan")
    )
    assert (stored, kind.name) == (None, "NAN"), "Optuna stores NaN in another way"


def test_optuna_distribution() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    wanted = {
        "a=choice(x, y)": CategoricalDistribution(("x", "y")),
        "a=1,2": CategoricalDistribution((1, 2)),
        "a=range(1, 4)": IntDistribution(1, 3),
        "a=interval(0.5, 1)": FloatDistribution(0.5, 1.0),
        "a=tag(log, interval(0.1, 1))": FloatDistribution(0.1, 1.0, log=True),
    }
    parser = OverridesParser.create()
    for text, distribution in wanted.items():
        found = compat.optuna_distribution(parser.parse_override(text))
        assert found == distribution, f"hydra-optuna-sweeper reads {text} as {found}"


def test_before_cuda_initialises(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: said.append("torch"))
    said: list[str] = []
    compat.before_cuda_initialises(lambda: said.append("before"))
    torch.cuda.init()  # type: ignore[no-untyped-call]
    assert said == ["before", "torch"], "torch initialises CUDA by another name than _lazy_init"
