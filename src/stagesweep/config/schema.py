"""Schemas of the config nodes that the framework owns. Imports no torch.

Each schema is registered in Hydra's ConfigStore as ``base_<name>`` of its group, and extended by
the YAML of that group. A stage class inherits its schema, so that its constructor and its config
always agree. The metadata of a field are its bounds, checked before a run starts, and
``fingerprint: False`` if it changes no result, only where or how often something is written: a
finished stage is then reused whatever the value is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from stagesweep.base.errors import UserError

NO_RESULT: dict[str, Any] = {"fingerprint": False}
# Value of `hardware.micro_batch` that searches for it.
AUTO = "auto"


def bounded(default: Any, *, result: bool = True, **bounds: float) -> Any:
    """A field for a finite number: at least ``ge``, above ``gt``, below ``lt``.

    The bounds hold for each number of a list. ``result``: whether the number changes a result.
    """
    return field(default=default, metadata={"fingerprint": result, **bounds})


class Mode(StrEnum):
    """Whether a metric is to be maximised or minimised."""

    max = "max"
    min = "min"


class Device(StrEnum):
    """Device of the tensors; ``auto`` uses a GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Parallel(StrEnum):
    """Each process has the whole model, or a shard of every parameter (FSDP2)."""

    replicate = "replicate"
    shard = "shard"


class Precision(StrEnum):
    """Number format of the forward pass; parameters stay fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Resume(StrEnum):
    """``auto`` reuses finished stages and resumes partial ones; ``never`` retrains."""

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

    lr: float | None = bounded(None, gt=0)
    weight_decay: float | None = bounded(None, ge=0)


@dataclass
class Optimizer:
    """A torch optimizer and its parameter groups (glob over dotted parameter names -> settings)."""

    _target_: str = "torch.optim.AdamW"
    lr: float = bounded(1e-3, gt=0)
    weight_decay: float = bounded(1e-5, ge=0)
    betas: tuple[float, float] = bounded((0.9, 0.999), ge=0, lt=1)
    groups: dict[str, Group] = field(default_factory=dict)


@dataclass
class Schedule:
    """Linear warmup over ``warmup`` epochs, then ``decay`` down to ``min_lr``, per step.

    ``plateau`` multiplies by ``factor`` when ``metric`` has not improved for ``patience``
    evaluations.
    """

    decay: Decay = Decay.cosine
    warmup: float = bounded(0.0, ge=0)
    min_lr: float = bounded(1e-6, ge=0)
    metric: str = "val_loss"
    mode: Mode = Mode.min
    factor: float = bounded(0.5, gt=0, lt=1)
    patience: int = bounded(5, ge=0)


@dataclass
class Weight:
    """Weight of a loss term in a stage, and the epochs over which it rises from zero."""

    weight: float = bounded(1.0, ge=0)
    ramp: float = bounded(0.0, ge=0)


@dataclass
class EarlyStop:
    """Stop after ``patience`` evaluations without improvement, or as soon as ``target`` is met."""

    mode: Mode = Mode.min
    patience: int | None = bounded(None, ge=0)
    min_delta: float = bounded(0.0, ge=0)
    target: float | None = bounded(None)


@dataclass
class Stage:
    """Base of all stages: the class that runs it."""

    _target_: str = MISSING


@dataclass
class Fit(Stage):
    """Train parameters by gradient descent."""

    _target_: str = "stagesweep.stage.fit.Fit"
    # The part of the model that is trained, if it has parts; the name of the data to train on, if
    # an earlier stage made them.
    part: str | None = None
    view: str | None = None
    epochs: int = bounded(MISSING, ge=1)
    # Effective batch size: samples of one optimizer step, on any hardware.
    batch_size: int = bounded(512, ge=1)
    loss: dict[str, Weight] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    clip_norm: float | None = bounded(1.0, gt=0)
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
    # Weights that the stage ends with: "last", or one of the metrics in `best`.
    select: str = "last"
    ema: float | None = bounded(None, gt=0, lt=1)
    eval_every: int = bounded(1, ge=1)
    # Epochs between checkpoints, and the minimum seconds between them.
    save_every: int = bounded(1, ge=1, result=False)
    save_seconds: float = bounded(5.0, ge=0, result=False)
    keep_last: int = bounded(2, ge=1, result=False)
    log_every: int = bounded(50, ge=1, result=False)
    histogram_every: int = bounded(10, ge=0, result=False)


@dataclass
class ChooseClusters(Stage):
    """Choose the number of clusters by bootstrap stability of k-means on the latent means."""

    _target_: str = "stagesweep.stage.clustering.choose_clusters.ChooseClusters"
    # Smallest and largest k tried, both included.
    k_range: tuple[int, int] = bounded((6, 18), ge=2)
    # Bootstrap samples for each k, and the starts of k-means on each.
    resamples: int = bounded(20, ge=3)
    n_init: int = bounded(3, ge=1)
    # A larger training set is represented by a random sample of this size.
    max_rows: int = bounded(3000, ge=1)


@dataclass
class InitClusters(Stage):
    """Place the cluster centres by k-means on the latent means."""

    _target_: str = "stagesweep.stage.clustering.init_clusters.InitClusters"
    # null: the choice of an earlier stage, or else the number of the model.
    k: int | None = bounded(None, ge=2)
    n_init: int = bounded(20, ge=1)
    max_iter: int = bounded(300, ge=1)


@dataclass
class Baselines(Stage):
    """Cluster with standard methods, to compare the model with."""

    _target_: str = "stagesweep.stage.clustering.baselines.Baselines"
    column: str = MISSING
    # null: the number of the model.
    k: int | None = bounded(None, ge=2)
    methods: list[str] = field(default_factory=lambda: ["kmeans", "gmm", "spectral", "autoencoder"])
    # How the method `autoencoder` is trained: the model of the run, with reconstruction alone.
    autoencoder: Fit | None = None
    # Refits from other starts; stability is their agreement with the first fit.
    stability_seeds: int = bounded(3, ge=0)


@dataclass
class Evaluate(Stage):
    """Score the clustering; save embeddings, assignments and tables."""

    _target_: str = "stagesweep.stage.clustering.evaluate.Evaluate"
    # The input column that the clustering is compared on (silhouette, baselines).
    column: str = MISSING
    # Label column that the clusters are scored against; null if there is none.
    label: str | None = None
    # Label column tested for enrichment in each cluster.
    enrichment: str | None = None
    # Label column that clusters should be independent of.
    leakage: str | None = None
    # k-means fits on the latent means; stability is their agreement with the model.
    stability_seeds: int = bounded(3, ge=0)
    min_active_units: int = bounded(2, ge=0)


@dataclass
class CrossValidate(Stage):
    """Cross-validation: train and score once for each fold of groups (donors, litters)."""

    _target_: str = "stagesweep.stage.cross_validate.CrossValidate"
    # How the model of each fold is trained; its part and data.
    fit: Fit | None = None
    # Splits of the data that are pooled before they are divided into folds.
    splits: list[str] = field(default_factory=lambda: ["train", "val", "test"])
    folds: int = bounded(5, ge=2)
    # One of `inner` parts of the training folds validates (best epoch, early stopping).
    inner: int = bounded(5, ge=2)
    # Column whose samples of equal value stay in one fold; column that folds are stratified by.
    group: str | None = None
    stratify: str | None = None
    # Metrics of each fold; `voted`: of predictions averaged over equal values of `vote`.
    metrics: dict[str, Any] = field(default_factory=dict)
    vote: str | None = None
    voted: dict[str, Any] = field(default_factory=dict)
    # Other methods that are fitted to each fold.
    baselines: dict[str, Any] = field(default_factory=dict)


@dataclass
class Figures(Stage):
    """Draw the figures of a clustering run."""

    _target_: str = "stagesweep.stage.clustering.figures.Figures"
    umap: bool = True
    dpi: int = bounded(120, ge=1)


@dataclass
class Hardware:
    """What a run uses of this machine. Only ``precision`` and ``tf32`` change its results."""

    device: Device = Device.auto
    # Processes of a run on each machine, one for each GPU; `nodes` is the number of machines.
    devices: int = bounded(1, ge=1, result=False)
    # Numbers of the GPUs to use, as many as `devices`.
    gpu_ids: list[int] | None = field(default=None, metadata=NO_RESULT | {"ge": 0})
    nodes: int = bounded(1, ge=1, result=False)
    # Whether each process has the whole model or a shard.
    parallel: Parallel = field(default=Parallel.replicate, metadata=NO_RESULT)
    # GPUs of each trial of a sweep.
    devices_per_trial: int = bounded(1, ge=1, result=False)
    # GPU memory that the profile needs, in GB (10^9 bytes).
    min_memory_gb: float | None = bounded(None, gt=0, result=False)
    # Whether a profile that does not fit the machine is an error, or only a warning.
    strict: bool = field(default=True, metadata=NO_RESULT)
    precision: Precision = Precision.auto
    # TF32 for fp32 matrix products; null: if the precision is below fp32.
    tf32: bool | None = None
    cudnn_benchmark: bool = field(default=False, metadata=NO_RESULT)
    compile: bool = field(default=False, metadata=NO_RESULT)
    threads: int | None = bounded(None, ge=1, result=False)
    # null: half the cores, at most 8.
    workers: int | None = bounded(None, ge=0, result=False)
    pin_memory: bool = field(default=True, metadata=NO_RESULT)
    # Largest number of samples in one forward pass. null: the whole batch; auto: the most that
    # fits. `micro_batches` bounds single stages, by a glob of <experiment>/<stage>.
    micro_batch: int | str | None = field(
        default=None, metadata=NO_RESULT | {"ge": 1, "literal": AUTO}
    )
    micro_batches: dict[str, int] = field(default_factory=dict, metadata=NO_RESULT | {"ge": 1})
    activation_checkpointing: bool = field(default=False, metadata=NO_RESULT)
    # Value of PYTORCH_ALLOC_CONF.
    allocator: str | None = field(default=None, metadata=NO_RESULT)
    # Write a profiler trace of some steps of each fit, with a summary.
    profile: bool = field(default=False, metadata=NO_RESULT)


@dataclass
class Objective:
    """The metric that a sweep optimises, ``<stage>/<metric>``, and its mode.

    For several objectives ``metric`` is a list, and ``mode`` a list as long or one mode for all.
    """

    metric: Any = MISSING
    mode: Any = Mode.max


def objectives(objective: Any) -> dict[str, Mode]:
    """The mode of each objective, by its metric; UserError if metrics and modes do not match."""
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
    """Variants that are compared with the full model, each with overrides of its own.

    ``variants`` are named; each override of ``leave_one_out`` is a variant by itself. ``metrics``
    are compared in the report beside the objective.
    """

    variants: dict[str, list[str]] = field(default_factory=dict)
    leave_one_out: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list, metadata=NO_RESULT)


@dataclass
class Search:
    """Total number of trials, and the search space (Hydra's sweep grammar).

    ``seed`` seeds the sampler: the same command proposes the same points again. ``study`` names the
    sweep and its folder; by default it follows from the command, so the same command continues.
    """

    n_trials: int = bounded(20, ge=1)
    seed: int = bounded(0, ge=0)
    study: str = "${study_of:${hydra:runtime.choices.search},${hydra:overrides.task}}"
    # Key -> its values, as text of Hydra's sweep grammar or as a list.
    space: dict[str, Any] = field(default_factory=dict)
    # Groups of keys whose lists of values vary together.
    zip: list[list[str]] = field(default_factory=list)
    # Keys of the space that exist only where another has a value: key -> "other=value[,value]".
    when: dict[str, str] = field(default_factory=dict)
    ablation: Ablation = field(default_factory=Ablation)
    # Runs of each point, with the seeds seed, seed + 1, ...; the objective is their mean.
    repeats: int = bounded(1, ge=1)
    # Points to try first, each a mapping of keys to values.
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    # A larger grid is refused.
    max_points: int = bounded(1000, ge=1)
    # Restarts, from its checkpoint, of a trial that was killed or ran out of memory.
    max_retries: int = bounded(1, ge=0)
    # Upper bound of a metric, or of `seconds` (training time of all stages). A point that exceeds
    # it is never the best, and samplers that support constraints avoid it.
    constraints: dict[str, float] = field(default_factory=dict)
    # `timeout`: seconds that a run may take. `budget`: seconds with running trials, over all starts
    # of the sweep, after which no trial is started.
    timeout: float | None = bounded(None, gt=0)
    budget: float | None = bounded(None, gt=0)
    # A sweep with a larger share of failed trials exits with status 1.
    max_failure_rate: float = bounded(1.0, ge=0)
    # The sweep stops once this many trials in a row have failed with the same error, if all before
    # them failed, too. 0: it never does.
    max_failures_in_a_row: int = bounded(5, ge=0)
    # Run the failed trials of earlier starts again, under their own numbers.
    retry_failed: bool = False
    # Optuna pruner (null: none), the metric of a fit that it watches, <stage>/<metric> (null: the
    # objective), and the mode of that metric (null: as the objective).
    pruner: Any = None
    prune_on: str | None = None
    prune_mode: Mode | None = None


@dataclass
class Sweep:
    """How a sweep runs. Changes no result."""

    # Parallel trials on this machine: a number, or auto: as many as fit on its GPUs, or else its
    # cores.
    slots: str = "auto"
    # When space or config have changed. refuse: an error; continue: keep the old trials; new: start
    # another sweep.
    on_change: str = "refuse"


@dataclass
class Config:
    """One composed run."""

    experiment: str = MISSING
    seed: int = bounded(0, ge=0)
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
