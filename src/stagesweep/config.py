"""The schemas of every config node the framework owns. This module imports no torch.

Each schema is registered in Hydra's ConfigStore as ``base_<name>`` in its own group, and the YAML
of the same group extends it. Stage classes inherit their schema, so that a stage's constructor
and its config can never drift apart. A field whose metadata says ``fingerprint: False`` changes no
result (only where or how often something is written), so a finished stage is reused whatever
its value is.
"""

import os
import platform
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from stagesweep import catalogue

NO_RESULT: dict[str, Any] = {"fingerprint": False}


class Mode(StrEnum):
    """Which way a metric is better."""

    max = "max"
    min = "min"


class Device(StrEnum):
    """Where tensors live; ``auto`` takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """Number format of the forward pass; parameters stay fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Resume(StrEnum):
    """``auto`` reuses finished stages and goes on from partial ones; ``never`` retrains."""

    auto = "auto"
    never = "never"


class Decay(StrEnum):
    """Shape of the learning rate after warmup."""

    constant = "constant"
    cosine = "cosine"
    plateau = "plateau"


@dataclass
class Group:
    """Settings of the parameters that a glob matches; null keeps the stage's own."""

    lr: float | None = None
    weight_decay: float | None = None


@dataclass
class Optimizer:
    """A torch optimizer and its parameter groups (glob over dotted parameter names -> settings)."""

    _target_: str = "torch.optim.AdamW"
    lr: float = 1e-3
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    groups: dict[str, Group] = field(default_factory=dict)


@dataclass
class Schedule:
    """Linear warmup over ``warmup`` epochs, then ``decay`` down to ``min_lr``, per step.

    ``plateau`` multiplies by ``factor`` when ``metric`` has not improved for ``patience``
    evaluations.
    """

    decay: Decay = Decay.cosine
    warmup: float = 0.0
    min_lr: float = 1e-6
    metric: str = "val_loss"
    mode: Mode = Mode.min
    factor: float = 0.5
    patience: int = 5


@dataclass
class Weight:
    """How much a loss term counts in a stage, and over how many epochs it rises from zero."""

    weight: float = 1.0
    ramp: float = 0.0


@dataclass
class EarlyStop:
    """Stop after ``patience`` evaluations without improvement, or as soon as ``target`` is met."""

    mode: Mode = Mode.min
    patience: int | None = None
    min_delta: float = 0.0
    target: float | None = None


@dataclass
class Stage:
    """What every stage has: the class that runs it."""

    _target_: str = MISSING


@dataclass
class Fit(Stage):
    """Train parameters by gradient descent."""

    _target_: str = "stagesweep.stage.fit.Fit"
    epochs: int = MISSING
    # Effective batch: how many samples one optimizer step sees, on any hardware.
    batch_size: int = 512
    loss: dict[str, Weight] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float | None = 1.0
    # Globs over dotted parameter names; a parameter is trained when the first list matches and
    # the second does not.
    train: list[str] = field(default_factory=lambda: ["*"])
    freeze: list[str] = field(default_factory=list)
    sampler: Any = None
    augment: Any = None
    metrics: dict[str, Any] = field(default_factory=dict)
    early_stop: dict[str, EarlyStop] = field(default_factory=dict)
    # A checkpoint is kept for the best value of each of these metrics.
    best: dict[str, Mode] = field(default_factory=dict)
    # Weights the stage ends with: "last", or one of the metrics in `best`.
    select: str = "last"
    ema: float | None = None
    eval_every: int = 1
    save_every: int = field(default=1, metadata=NO_RESULT)
    keep_last: int = field(default=1, metadata=NO_RESULT)
    log_every: int = field(default=50, metadata=NO_RESULT)
    histogram_every: int = field(default=10, metadata=NO_RESULT)


@dataclass
class ChooseClusters(Stage):
    """Choose the number of clusters by bootstrap stability of k-means on the latent means."""

    _target_: str = "stagesweep.stage.choose_clusters.ChooseClusters"
    # Smallest and largest k tried, both included.
    k_range: tuple[int, int] = (6, 18)
    # Bootstrap samples for each k, each clustered from so many starts.
    resamples: int = 20
    n_init: int = 3
    # Of a larger training set, a random sample of this many stands for all.
    max_rows: int = 5000


@dataclass
class InitClusters(Stage):
    """Place the cluster centres by k-means on the latent means."""

    _target_: str = "stagesweep.stage.init_clusters.InitClusters"
    # null takes the choice of an earlier stage, or else the model's own number.
    k: int | None = None
    n_init: int = 20
    max_iter: int = 300


@dataclass
class Baselines(Stage):
    """Cluster with standard methods, for the same table as the model."""

    _target_: str = "stagesweep.stage.baselines.Baselines"
    column: str = MISSING
    # null takes the number the model uses.
    k: int | None = None
    methods: list[str] = field(default_factory=lambda: ["kmeans", "gmm", "spectral", "autoencoder"])
    # How the autoencoder of that name is trained: the run's model, its reconstruction alone.
    autoencoder: Fit | None = None
    # Refits of each method, the first of which is scored; all of them give its stability.
    seeds: int = 3


@dataclass
class Evaluate(Stage):
    """Score the clustering and save embeddings, assignments and tables."""

    _target_: str = "stagesweep.stage.evaluate.Evaluate"
    # The column the clustering is compared with (silhouette of inputs, baselines).
    column: str = MISSING
    # Label column the clusters are scored against; null when there is none.
    label: str | None = None
    # Label column tested for enrichment in each cluster.
    enrichment: str | None = None
    # Label column that clusters should be independent of.
    leakage: str | None = None
    stability_seeds: int = 3
    min_active_units: int = 2


@dataclass
class Figures(Stage):
    """Draw the figures of a clustering run."""

    _target_: str = "stagesweep.stage.figures.Figures"
    umap: bool = True
    dpi: int = 120


@dataclass
class Hardware:
    """What a run may use of this machine. No field changes what is learnt, but for precision."""

    device: Device = Device.auto
    devices: int = field(default=1, metadata=NO_RESULT)
    precision: Precision = Precision.auto
    threads: int | None = field(default=None, metadata=NO_RESULT)
    # Largest number of samples in one forward pass; null takes the whole batch.
    micro_batch: int | None = field(default=None, metadata=NO_RESULT)
    workers: int = field(default=0, metadata=NO_RESULT)
    compile: bool = field(default=False, metadata=NO_RESULT)
    activation_checkpointing: bool = field(default=False, metadata=NO_RESULT)


@dataclass
class Objective:
    """The metric a sweep steers by: ``<stage>/<metric>``, and which way it is better."""

    metric: str = MISSING
    mode: Mode = Mode.max


@dataclass
class Search:
    """How many trials a sweep has, and the space they come from (Hydra's sweep grammar).

    ``seed`` is the sampler's, so that the same command proposes the same points again; ``study``
    names the sweep and its folder.
    """

    n_trials: int = 20
    seed: int = 0
    study: str = "${now:%Y-%m-%d_%H-%M-%S}_${host:}"
    space: dict[str, str] = field(default_factory=dict)


@dataclass
class Config:
    """The whole of one composed run."""

    experiment: str = MISSING
    seed: int = 0
    resume: Resume = Resume.auto
    init_from: str | None = None
    model: Any = MISSING
    data: Any = MISSING
    loss: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)
    objective: Objective = field(default_factory=Objective)
    search: Search = field(default_factory=Search)


# What a config may name as `_target_`.
TRUSTED = ("stagesweep.*", "torch.*", "sklearn.*", "optuna.*")


def trusted() -> tuple[str, ...]:
    """Patterns of the targets that may be instantiated from a config.

    A user adds packages of their own in the environment: ``STAGESWEEP_TRUST=mylab,other.models``.
    Only the person at the command line can, never a config: that is the point of the list.
    """
    added = os.environ.get("STAGESWEEP_TRUST", "").replace(",", " ").split()
    return (*TRUSTED, *(f"{package.removesuffix('.*')}.*" for package in added))


def folder() -> Path:
    """Where the YAML lives: inside an installed package, or else at the root of the checkout."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "conf"


def register() -> None:
    """Put every schema into Hydra's ConfigStore, and the resolvers that the YAML uses."""
    OmegaConf.register_resolver("host", lambda: platform.node().split(".")[0], replace=True)
    OmegaConf.register_resolver("direction", lambda mode: f"{Mode(mode)}imize", replace=True)
    OmegaConf.register_resolver("list_groups", catalogue.groups, replace=True)
    OmegaConf.register_resolver("list_experiments", catalogue.experiments, replace=True)
    store = ConfigStore.instance()
    store.store(name="base_config", node=Config)
    store.store(group="hardware", name="base_hardware", node=Hardware)
    for name, node in {
        "fit": Fit,
        "choose_clusters": ChooseClusters,
        "init_clusters": InitClusters,
        "baselines": Baselines,
        "evaluate": Evaluate,
        "figures": Figures,
    }.items():
        store.store(group="stage", name=f"base_{name}", node=node)
