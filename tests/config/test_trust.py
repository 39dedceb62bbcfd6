"""Which classes of the libraries a config may name."""

import pytest

from stagesweep.base.errors import UserError
from stagesweep.config import trust
from stagesweep.config.signatures import locate, locate_all

# Callables that read or write files, open sockets, import, compile, or start processes.
HARMFUL = """
torch.load torch.save torch.hub.load torch.hub.download_url_to_file
torch.hub.load_state_dict_from_url torch.compile torch.jit.load torch.jit.save torch.jit.script
torch.jit.CompilationUnit torch.from_file
 torch.utils.cpp_extension.load
torch.utils.cpp_extension.load_inline torch.utils.cpp_extension.CppExtension
torch.package.PackageImporter torch.package.PackageExporter
torch.export.load torch.distributed.init_process_group torch.distributed.TCPStore
torch.distributed.FileStore torch.multiprocessing.spawn torch.utils.data.DataLoader
torch.fx.Interpreter torch.PyTorchFileReader torch.serialization.os.system torch.os.system
torch.autograd.profiler.profile torch.utils.tensorboard.SummaryWriter torch.classes.load_library
sklearn.datasets.fetch_openml sklearn.datasets.load_files sklearn.datasets.load_svmlight_file
sklearn.datasets.dump_svmlight_file sklearn.datasets.fetch_20newsgroups
sklearn.datasets.clear_data_home sklearn.utils.Bunch sklearn.utils.estimator_html_repr
optuna.storages.RDBStorage optuna.storages.JournalStorage optuna.create_study optuna.load_study
optuna.delete_study optuna.copy_study optuna.storages.journal.JournalFileBackend
optuna.artifacts.FileSystemArtifactStore optuna.Study optuna.samplers.TPESampler
stagesweep.config.signatures.resolve_name stagesweep.base.files.atomic_write
stagesweep.store.store.Store stagesweep.core.checkpoint.load stagesweep.data.view.torch.load
stagesweep.data.derived.Path stagesweep.cli.main
""".split()  # noqa: SIM905
KEYS = ("data", "model", "model.encoder.layers[0]", "loss.kl", "stage.joint", "stage.joint.sampler",
        "stage.joint.augment", "stage.joint.metrics.x", "stage.joint.optimizer", "search.pruner",
        "hydra.sweeper.sampler")  # fmt: skip
ALLOWED = {
    "model": "torch.nn.Linear",
    "stage.joint.metrics.knn": "sklearn.neighbors.KNeighborsClassifier",
    "stage.joint.optimizer": "torch.optim.SGD",
    "search.pruner": "optuna.pruners.MedianPruner",
    "search.pruner.wrapped_pruner": "optuna.pruners.MedianPruner",
    "hydra.sweeper.sampler": "optuna.samplers.TPESampler",
    "hydra.sweeper.sampler.independent_sampler": "optuna.samplers.RandomSampler",
    "loss.kl": "stagesweep.loss.kl.KL",
    "data": "stagesweep.systems.audiogram.simulate.simulated_audiogram",
}


@pytest.mark.parametrize("target", HARMFUL)
def test_callables_that_read_write_or_compile_are_refused(target: str) -> None:
    for key in KEYS:
        if (key, target) == ("hydra.sweeper.sampler", "optuna.samplers.TPESampler"):
            continue
        with pytest.raises(UserError) as caught:
            locate(key, target)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{key}._target_: ")


@pytest.mark.parametrize(("key", "target"), ALLOWED.items())
def test_a_key_takes_the_classes_of_its_kind(key: str, target: str) -> None:
    assert callable(locate(key, target))


def test_nested_targets_are_checked() -> None:
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.load", "f": "x"}]}
    with pytest.raises(UserError) as caught:
        locate_all("model", nested)
    assert str(caught.value) == (
        "model._args_[0]._target_: 'torch.load' is not a torch module; if you trust it, "
        "export STAGESWEEP_TRUST=torch.load"
    )


def test_the_user_may_trust_a_single_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGESWEEP_TRUST", "torch.load")
    monkeypatch.setattr(trust, "added", trust.read())
    assert callable(locate("model", "torch.load"))
    with pytest.raises(UserError):
        locate("model", "torch.save")


def test_a_config_cannot_trust_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGESWEEP_TRUST", "pandas")  # as Hydra does for hydra.job.env_set
    assert not trust.matches("pandas.read_pickle", trust.trusted())
    for name in ("STAGESWEEP_TRUST", "PYTHONPATH", "LD_PRELOAD"):
        with pytest.raises(UserError, match=rf"^hydra.job.env_set.{name}: no config can set it"):
            trust.check_variables({"OMP_NUM_THREADS": 1, name: "pandas"})
