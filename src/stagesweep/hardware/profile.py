"""The hardware profile with every ``auto`` decided."""

import logging
import os
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import torch

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.hardware.detection import devices
from stagesweep.hardware.detection import may_be_there as gpu_may_be_there

log = logging.getLogger(__name__)

FORMATS = {schema.Precision.bf16: torch.bfloat16, schema.Precision.fp16: torch.float16}
CPU, SHARD = schema.Device.cpu, schema.Parallel.shard
# What torch takes by default: OMP_NUM_THREADS, or else the cores there are.
CORES = torch.get_num_threads()


@dataclass(frozen=True)
class Machine:
    """A profile with every ``auto`` decided. ``autocast`` is None for fp32.

    ``probe``: the micro-batch of each fit is to be found by trying.
    """

    device: torch.device
    precision: schema.Precision
    autocast: torch.dtype | None
    threads: int | None
    micro_batch: int | None
    workers: int
    compile: bool
    activation_checkpointing: bool
    tf32: bool = False
    pin_memory: bool = True
    probe: bool = False
    micro_batches: dict[str, int] = field(default_factory=dict)
    profile: bool = False
    shard: bool = False

    def at(self, stage: str) -> "Machine":
        """The machine for one stage, ``<experiment>/<stage>``: the least of what bounds its
        micro-batch; one that is found by trying has no other bound.
        """
        bounds = [n for pattern, n in self.micro_batches.items() if fnmatch(stage, pattern)]
        if self.probe or not bounds:
            return self
        return replace(self, micro_batch=min([*bounds, self.micro_batch or bounds[0]]))

    def set_threads(self, parameters: int) -> None:
        """Threads of CPU operations for a model of so many parameters.

        Unless the profile says, a model below a million parameters gets one: its operations are
        too short to share, and on a busy machine two threads wait for each other.
        """
        torch.set_num_threads(self.threads or (1 if parameters < 1_000_000 else CORES))


@dataclass(frozen=True)
class Choice:
    """What this machine makes of a profile: `reasons` of what was left open, and `instead` what is
    done where the profile does not fit; `small` when the GPU's memory does not.
    """

    device: torch.device
    precision: schema.Precision
    tf32: bool
    small: bool
    reasons: dict[str, str]
    instead: list[str]


def resolve(settings: schema.Hardware) -> Machine:
    """Decide what the profile leaves open, tell torch, and say what was chosen."""
    chosen = choose(settings)
    for line in chosen.instead:
        log.warning("%s", line)
    given = settings.micro_batch
    if chosen.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if chosen.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = chosen.tf32
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    machine = Machine(
        device=chosen.device,
        precision=chosen.precision,
        autocast=FORMATS.get(chosen.precision),
        tf32=chosen.tf32,
        threads=settings.threads,
        micro_batch=given if isinstance(given, int) else None,
        probe=given == schema.AUTO or (chosen.small and settings.parallel is not SHARD),
        micro_batches=settings.micro_batches,
        workers=min(8, CORES // 2) if settings.workers is None else settings.workers,
        pin_memory=settings.pin_memory,
        compile=settings.compile,
        activation_checkpointing=settings.activation_checkpointing,
        profile=settings.profile,
        shard=settings.parallel is SHARD,
    )
    log.info("hardware: %s", described(machine, chosen.reasons))
    return machine


def described(machine: Machine, reasons: dict[str, str]) -> str:
    """One line: what was chosen, and why where the profile left it open."""
    if machine.device.type == "cuda":
        name = f"{torch.cuda.get_device_name()} ({gigabytes():.0f} GB)"
    else:
        name = "cpu" + reasons.get("device", "")
    threads = machine.threads or f"1 or {CORES} by size of model"
    pieces = f"at most {machine.micro_batch}" if machine.micro_batch else "whole batches"
    parts = [
        name,
        machine.precision + reasons.get("precision", ""),
        *(["TF32"] if machine.tf32 else []),
        f"threads {threads}",
        f"loader workers {machine.workers}",
        "micro-batch found by trying" if machine.probe else pieces,
    ]
    return ", ".join(parts)


def gigabytes() -> float:
    """Memory of the GPU in GB, of 10^9 bytes: what a card of "80 GB" has a little more of."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9


def choose(settings: schema.Hardware) -> Choice:
    """Device and number format; UserError for a profile that this machine cannot follow, or with
    ``strict`` false what is done instead.
    """
    misfits: list[Misfit] = []
    there = gpu_may_be_there() and torch.cuda.is_available()
    use_gpu = there and settings.device is not schema.Device.cpu
    if settings.device is schema.Device.cuda and not there:
        misfits.append(NO_GPU)
        settings = replace(settings, precision=schema.Precision.fp32)
    if settings.gpu_ids is not None and not use_gpu:
        misfits.append(no_ids(settings.gpu_ids))
    started = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    wanted, count = max(devices(settings), started), torch.cuda.device_count() if use_gpu else 0
    if use_gpu and count < started:
        raise UserError(f"{started} processes were started, but torch finds {count} GPUs")
    # Without a GPU, several processes share the CPU, unless the profile may be departed from.
    alone = wanted > 1 and not settings.strict and settings.device is not CPU
    if count < wanted and (use_gpu or alone):
        misfits.append(too_few(wanted, count))
    bf16 = use_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    reasons = {"precision": f" (the GPU has {'it' if bf16 else 'no bf16'})"} if use_gpu else {}
    if not there and settings.device is not schema.Device.cpu:
        reasons["device"] = " (torch finds no GPU)"
    precision = settings.precision
    if precision is schema.Precision.auto:
        precision = schema.Precision.bf16 if bf16 else schema.Precision.fp32
    elif precision is schema.Precision.fp16 and not use_gpu:
        misfits.append(NO_FP16)
        precision = schema.Precision.fp32
    elif precision is schema.Precision.bf16 and use_gpu and not bf16:
        misfits.append(NO_BF16)
        precision = schema.Precision.fp32
    if settings.precision is not schema.Precision.auto:
        reasons.pop("precision", None)
    memory = settings.min_memory_gb
    small = use_gpu and memory is not None and gigabytes() < memory
    if memory is not None and small:
        misfits.append(too_small(memory, settings.parallel is SHARD))
    if misfits and settings.strict:
        fault, remedy, _ = misfits[0]
        raise UserError(f"{fault}; {remedy}")
    lower = precision is not schema.Precision.fp32
    return Choice(
        device=torch.device("cuda" if use_gpu else "cpu"),
        precision=precision,
        tf32=use_gpu and (lower if settings.tf32 is None else settings.tf32),
        small=small,
        reasons=reasons,
        instead=[f"{fault}: {fallback}" for fault, _, fallback in misfits],
    )


# What does not fit, what to set, and what is done instead when the profile is not strict.
Misfit = tuple[str, str, str]
NO_GPU: Misfit = (
    "hardware.device=cuda, but torch finds no GPU",
    "set hardware.device=cpu, or hardware.strict=false to fall back to it",
    "going on with the CPU in fp32",
)
NO_FP16: Misfit = (
    "hardware.precision=fp16 needs a GPU",
    "set it to bf16 or fp32",
    "going on with fp32",
)
NO_BF16: Misfit = (
    "hardware.precision=bf16, which this GPU does not have",
    "set it to fp16 or fp32",
    "going on with fp32",
)


def too_few(wanted: int, count: int) -> Misfit:
    """Fewer GPUs than there are to be processes."""
    found = f"{count} GPU{'s' * (count != 1)}" if count else "no GPU"
    return (
        f"hardware.devices={wanted}, but torch finds {found}",
        f"set it to {count}, or set hardware.device=cpu or hardware.strict=false",
        f"going on with {max(count, 1)} process{'es' * (count > 1)}",
    )


def no_ids(ids: list[int]) -> Misfit:
    """GPUs by number where none is used."""
    return (
        f"hardware.gpu_ids={ids}, but no GPU is used",
        "leave it out",
        "going on without",
    )


def too_small(wanted: float, divided: bool) -> Misfit:
    """A GPU with less memory than the profile is made for."""
    fallback = "with the micro-batch as it is" if divided else "with hardware.micro_batch=auto"
    return (
        f"this profile is for a GPU of {wanted:g} GB, and {torch.cuda.get_device_name()} has "
        f"{gigabytes():.0f}",
        "choose another hardware=, or set hardware.strict=false",
        f"going on {fallback}",
    )
