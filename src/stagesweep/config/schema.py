"""The schemas of every config node the framework owns. This module imports no torch.

Each schema is registered in Hydra's ConfigStore as ``base_<name>`` in its own group, and the YAML
of the same group extends it. Stage classes inherit their schema, so that a stage's constructor
and its config can never drift apart. The metadata of a field says what a person may set it to
(validated before a run starts), and ``fingerprint: False`` where it changes no result, only where
or how often something is written: a finished stage is then reused whatever its value is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from stagesweep.base.errors import UserError

NO_RESULT: dict[str, Any] = {"fingerprint": False}
# The word for a micro-batch that is found by trying.
AUTO = "auto"


def number(default: Any, *, result: bool = True, **bounds: float) -> Any:
    """A field for a finite number within ``bounds``: least, above (exclusive), below (exclusive).

    They hold for every number of a list. ``result`` tells whether the number changes a result.
    """
    return field(default=default, metadata={"fingerprint": result, **bounds})


class Mode(StrEnum):
    """Which way a metric is better."""

    max = "max"
    min = "min"


class Device(StrEnum):
    """Where tensors live; ``auto`` takes a GPU when there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Parallel(StrEnum):
    """Processes each have the whole model, or a part of every parameter (FSDP2)."""

    replicate = "replicate"
    shard = "shard"


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

    lr: float | None = number(None, above=0)
    weight_decay: float | None = number(None, least=0)


@dataclass
class Optimizer:
    """A torch optimizer and its parameter groups (glob over dotted parameter names -> settings)."""

    _target_: str = "torch.optim.AdamW"
    lr: float = number(1e-3, above=0)
    weight_decay: float = number(1e-5, least=0)
    betas: tuple[float, float] = number((0.9, 0.999), least=0, below=1)
    groups: dict[str, Group] = field(default_factory=dict)


@dataclass
class Schedule:
    """Linear warmup over ``warmup`` epochs, then ``decay`` down to ``min_lr``, per step.

    ``plateau`` multiplies by ``factor`` when ``metric`` has not improved for ``patience``
    evaluations.
    """

    decay: Decay = Decay.cosine
    warmup: float = number(0.0, least=0)
    min_lr: float = number(1e-6, least=0)
    metric: str = "val_loss"
    mode: Mode = Mode.min
    factor: float = number(0.5, above=0, below=1)
    patience: int = number(5, least=0)


@dataclass
class Weight:
    """How much a loss term counts in a stage, and over how many epochs it rises from zero."""

    weight: float = number(1.0, least=0)
    ramp: float = number(0.0, least=0)


@dataclass
class EarlyStop:
    """Stop after ``patience`` evaluations without improvement, or as soon as ``target`` is met."""

    mode: Mode = Mode.min
    patience: int | None = number(None, least=0)
    min_delta: float = number(0.0, least=0)
    target: float | None = number(None)


@dataclass
class Stage:
    """What every stage has: the class that runs it."""

    _target_: str = MISSING


@dataclass
class Fit(Stage):
    """Train parameters by gradient descent."""

    _target_: str = "stagesweep.stage.fit.Fit"
    # Of a model of several parts the one that is trained; the data it learns from, if an earlier
    # stage made them.
    part: str | None = None
    view: str | None = None
    epochs: int = number(MISSING, least=1)
    # Effective batch: how many samples one optimizer step sees, on any hardware.
    batch_size: int = number(512, least=1)
    loss: dict[str, Weight] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float | None = number(1.0, above=0)
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
    ema: float | None = number(None, above=0, below=1)
    eval_every: int = number(1, least=1)
    # A checkpoint every so many epochs, but no two within so many seconds.
    save_every: int = number(1, least=1, result=False)
    save_seconds: float = number(5.0, least=0, result=False)
    keep_last: int = number(2, least=1, result=False)
    log_every: int = number(50, least=1, result=False)
    histogram_every: int = number(10, least=0, result=False)


@dataclass
class ChooseClusters(Stage):
    """Choose the number of clusters by bootstrap stability of k-means on the latent means."""

    _target_: str = "stagesweep.stage.clustering.choose_clusters.ChooseClusters"
    # Smallest and largest k tried, both included.
    k_range: tuple[int, int] = number((6, 18), least=2)
    # Bootstrap samples for each k, each clustered from so many starts.
    resamples: int = number(20, least=3)
    n_init: int = number(3, least=1)
    # Of a larger training set, a random sample of this many stands for all.
    max_rows: int = number(3000, least=1)


@dataclass
class InitClusters(Stage):
    """Place the cluster centres by k-means on the latent means."""

    _target_: str = "stagesweep.stage.clustering.init_clusters.InitClusters"
    # null takes the choice of an earlier stage, or else the model's own number.
    k: int | None = number(None, least=2)
    n_init: int = number(20, least=1)
    max_iter: int = number(300, least=1)


@dataclass
class Baselines(Stage):
    """Cluster with standard methods, for the same table as the model."""

    _target_: str = "stagesweep.stage.clustering.baselines.Baselines"
    column: str = MISSING
    # null takes the number the model uses.
    k: int | None = number(None, least=2)
    methods: list[str] = field(default_factory=lambda: ["kmeans", "gmm", "spectral", "autoencoder"])
    # How the autoencoder of that name is trained: the run's model, its reconstruction alone.
    autoencoder: Fit | None = None
    # Refits of each method from other starts, whose agreement with the first is its stability.
    stability_seeds: int = number(3, least=0)


@dataclass
class Evaluate(Stage):
    """Score the clustering and save embeddings, assignments and tables."""

    _target_: str = "stagesweep.stage.clustering.evaluate.Evaluate"
    # The column the clustering is compared with (silhouette of inputs, baselines).
    column: str = MISSING
    # Label column the clusters are scored against; null when there is none.
    label: str | None = None
    # Label column tested for enrichment in each cluster.
    enrichment: str | None = None
    # Label column that clusters should be independent of.
    leakage: str | None = None
    # k-means refits on the latent means, whose agreement with the model is its stability.
    stability_seeds: int = number(3, least=0)
    min_active_units: int = number(2, least=0)


@dataclass
class CrossValidate(Stage):
    """Train and score anew for each fold, on which groups (donors, litters) have no part."""

    _target_: str = "stagesweep.stage.cross_validate.CrossValidate"
    # How a model is trained, and of which part and data.
    fit: Fit | None = None
    # Splits of the data that are pooled and dealt anew.
    splits: list[str] = field(default_factory=lambda: ["train", "val", "test"])
    folds: int = number(5, least=2)
    # Of all but the fold, one of so many parts steers the fit (epoch, early stop).
    inner: int = number(5, least=2)
    # Column whose samples of one value stay together; column that folds have equal shares of.
    group: str | None = None
    stratify: str | None = None
    # Scores of each fold; and of the mean predictions of samples with one value of `vote`.
    metrics: dict[str, Any] = field(default_factory=dict)
    vote: str | None = None
    voted: dict[str, Any] = field(default_factory=dict)
    # What else is fitted to each fold: methods that are called with its columns.
    baselines: dict[str, Any] = field(default_factory=dict)


@dataclass
class Figures(Stage):
    """Draw the figures of a clustering run."""

    _target_: str = "stagesweep.stage.clustering.figures.Figures"
    umap: bool = True
    dpi: int = number(120, least=1)


@dataclass
class Hardware:
    """What a run may use of this machine. Only ``precision`` and ``tf32`` change what is learnt."""

    device: Device = Device.auto
    # Processes a run uses on each of so many machines, one a GPU.
    devices: int = number(1, least=1, result=False)
    # Which GPUs, by their numbers; as many as there are `devices`.
    gpu_ids: list[int] | None = field(default=None, metadata=NO_RESULT | {"least": 0})
    nodes: int = number(1, least=1, result=False)
    # What each of several processes has of the model: all of it, or a part.
    parallel: Parallel = field(default=Parallel.replicate, metadata=NO_RESULT)
    # GPUs that each trial of a sweep holds.
    devices_per_trial: int = number(1, least=1, result=False)
    # Memory that the profile is made for, in GB (10^9 bytes); a smaller GPU does not fit it.
    min_memory_gb: float | None = number(None, above=0, result=False)
    # What does not fit the machine is an error, or else a warning that says what is done instead.
    strict: bool = field(default=True, metadata=NO_RESULT)
    precision: Precision = Precision.auto
    # Matrix products of fp32 in TF32; null: where the precision is below fp32 anyway.
    tf32: bool | None = None
    cudnn_benchmark: bool = field(default=False, metadata=NO_RESULT)
    compile: bool = field(default=False, metadata=NO_RESULT)
    threads: int | None = number(None, least=1, result=False)
    # null: half the cores, at most 8.
    workers: int | None = number(None, least=0, result=False)
    pin_memory: bool = field(default=True, metadata=NO_RESULT)
    # Largest number of samples in one forward pass: null takes the whole batch, auto the most that
    # fits; and, by a glob of <experiment>/<stage>, bounds of single stages.
    micro_batch: int | str | None = field(
        default=None, metadata=NO_RESULT | {"least": 1, "word": AUTO}
    )
    micro_batches: dict[str, int] = field(default_factory=dict, metadata=NO_RESULT | {"least": 1})
    activation_checkpointing: bool = field(default=False, metadata=NO_RESULT)
    # What torch reads from PYTORCH_ALLOC_CONF.
    allocator: str | None = field(default=None, metadata=NO_RESULT)
    # Write a trace of some steps of each fit, and a summary of it.
    profile: bool = field(default=False, metadata=NO_RESULT)


@dataclass
class Objective:
    """The metric a sweep steers by: ``<stage>/<metric>``, and which way it is better.

    Of several objectives ``metric`` is a list, and ``mode`` one as long, or one mode for all.
    """

    metric: Any = MISSING
    mode: Any = Mode.max


def aims(objective: Any) -> dict[str, Mode]:
    """Which way each objective is better, by metric; UserError when metrics and modes differ."""
    metrics, modes = (
        list(each) if isinstance(each, Sequence) and not isinstance(each, str) else [each]
        for each in (objective.metric, objective.mode)
    )
    if len(modes) == 1:
        modes *= len(metrics)
    if not metrics or len(modes) != len(metrics):
        raise UserError(
            f"objective.mode has {len(modes)} entries and objective.metric {len(metrics)}; give "
            "each metric a mode, or all of them one"
        )
    if wrong := [mode for mode in modes if str(mode) not in list(Mode)]:
        raise UserError(f"objective.mode={wrong[0]} must be max or min")
    if len(set(metrics)) < len(metrics):
        raise UserError("objective.metric names a metric twice; name each once")
    return {str(name): Mode(str(mode)) for name, mode in zip(metrics, modes, strict=True)}


@dataclass
class Ablation:
    """The full model, and what is compared with it: overrides of its own for each variant.

    ``variants`` are named; each override of ``leave_one_out`` is a variant by itself. ``metrics``
    are compared in the report beside the objective.
    """

    variants: dict[str, list[str]] = field(default_factory=dict)
    leave_one_out: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list, metadata=NO_RESULT)


@dataclass
class Search:
    """How many trials a sweep has in all, and the space they come from (Hydra's sweep grammar).

    ``seed`` is the sampler's, so that the same command proposes the same points again; ``study``
    names the sweep and its folder, by default after the command, so that the same command goes on.
    """

    n_trials: int = number(20, least=1)
    seed: int = number(0, least=0)
    study: str = "${study_of:${hydra:runtime.choices.search},${hydra:overrides.task}}"
    space: dict[str, str] = field(default_factory=dict)
    # Groups of keys whose lists of values are gone through together.
    zip: list[list[str]] = field(default_factory=list)
    # Keys of the space that exist only where another has a value: key -> "other=value[,value]".
    when: dict[str, str] = field(default_factory=dict)
    ablation: Ablation = field(default_factory=Ablation)
    # Runs of each point, under the seeds seed, seed + 1, ...; its value is their mean.
    repeats: int = number(1, least=1)
    # Points to try first, each a mapping of keys to values.
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    # A grid of more points is refused.
    max_points: int = number(1000, least=1)
    # How often a trial that was killed or ran out of memory starts again, from its checkpoint.
    max_retries: int = number(1, least=0)
    # Metric, or `seconds` (what training all stages takes) -> the most it may be: a point that is
    # above is never the best, and a sampler that can keeps away from it.
    constraints: dict[str, float] = field(default_factory=dict)
    # Seconds that a run may take, and seconds with trials under way, over all starts of the sweep,
    # after which it begins no more.
    timeout: float | None = number(None, above=0)
    budget: float | None = number(None, above=0)
    # A sweep with a larger share of failed trials ends with status 1.
    max_failure_rate: float = number(1.0, least=0)
    # What ends a trial early (`_target_` of an Optuna pruner; null: nothing does), by which metric
    # of a fit: <stage>/<metric> (null: the objective), and which way it is better (null: as the
    # objective).
    pruner: Any = None
    prune_on: str | None = None
    prune_mode: Mode | None = None


@dataclass
class Sweep:
    """How a sweep runs; nothing here changes a result."""

    # Trials at once on this machine: a number, or auto: as many as its GPUs, or else its cores,
    # have room for.
    slots: str = "auto"
    # refuse, continue with the old trials counted in, or new: begin another sweep beside it.
    on_change: str = "refuse"


@dataclass
class Config:
    """The whole of one composed run."""

    experiment: str = MISSING
    seed: int = number(0, least=0)
    resume: Resume = Resume.auto
    init_from: str | None = None
    model: Any = MISSING
    data: Any = MISSING
    loss: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)
    objective: Objective = field(default_factory=Objective)
    search: Search = field(default_factory=Search)
    sweep: Sweep = field(default_factory=Sweep)
