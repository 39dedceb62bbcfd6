"""A job is run as Hydra would run it."""

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config import register, trust
from stagesweep.sweep.engine.worker import run_task
from stagesweep.sweep.space.compose import SweepContext, with_example

log = logging.getLogger(__name__)

FIXED = ["experiment=digits", "seed=1"]
WHERE = [
    "search.study=s",
    "hydra.job.chdir=true",
    "+hydra.job.env_set.WHO=${experiment}",
]


class Watching:
    """A callback that records its calls."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_job_start(self, **given: Any) -> None:
        self.told.append(given["config"].hydra.job.num)

    def on_job_end(self, job_return: Any, **given: Any) -> None:
        self.told.append(job_return.return_value)


def task(cfg: DictConfig) -> Any:
    """Return everything that a task can see."""
    log.info("at work")
    if cfg.seed == 3:
        raise UserError("seed=3 is wrong")
    hydra = OmegaConf.to_container(HydraConfig.get(), resolve=False)  # type: ignore[arg-type]
    assert OmegaConf.is_readonly(HydraConfig.get())  # type: ignore[arg-type]
    place = HydraConfig.get().runtime.output_dir
    return cfg, hydra, os.environ["WHO"], str(Path.cwd()), place, cfg.experiment


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore logging and Hydra's config after each test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level


def work(folder: Path, *watching: Watching) -> SweepContext:
    """The context of a sweep in the folder, as another process receives it."""
    register.register()
    callbacks = Callbacks()
    callbacks.callbacks = []
    with initialize_config_dir(str(register.folder()), job_name="stagesweep"):
        loader = GlobalHydra.instance().config_loader()
        given = [*FIXED, *WHERE, f"hydra.sweep.dir={folder}"]
        master = loader.load_configuration("config", given, run_mode=RunMode.MULTIRUN)
        context = HydraContext(loader, callbacks, trust.trusted())
        packed = with_example(context, master, (__name__, "task"), ["seed=1", FIXED[0]])
    found: SweepContext = pickle.loads(packed)
    found.context.callbacks.callbacks.extend(watching)
    return found


def test_a_job_writes_and_sees_what_hydra_provides(tmp_path: Path) -> None:
    ours, theirs, watching = tmp_path / "a", tmp_path / "b", Watching()
    before = Path.cwd()
    cfg, hydra, *rest = run_task(work(ours), 7, "7", ["seed=2", FIXED[0]])
    known, shown, *others = run_task(work(theirs, watching), 7, "7", ["seed=2", FIXED[0]])
    assert watching.told[0] == 7  # run by Hydra
    assert watching.told[1][0] == known
    assert cfg == known
    assert cfg.seed == 2
    assert "hydra" not in cfg
    assert str(hydra).replace(str(ours), str(theirs)) == str(shown)
    assert rest == ["digits", str(ours / "7"), str(ours / "7"), "digits"]
    assert others == ["digits", str(theirs / "7"), str(theirs / "7"), "digits"]
    assert Path.cwd() == before
    assert "WHO" not in os.environ
    for name in ("config.yaml", "hydra.yaml", "overrides.yaml"):
        one, two = ((each / "7" / ".hydra" / name).read_text() for each in (ours, theirs))
        assert one.replace(str(ours), str(theirs)) == two
    assert "at work" in (ours / "7" / "run.log").read_text()


def test_the_error_of_a_job_is_in_its_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seed=3 is wrong"):
        run_task(work(tmp_path), 0, "0", ["seed=3", FIXED[0]])
    said = (tmp_path / "0" / "run.log").read_text()
    assert "Job failed" in said
    assert "Traceback" in said
