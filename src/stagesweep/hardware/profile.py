"""Resolves a hardware profile: decides every ``auto`` for this machine."""

import logging
import os
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import torch

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.hardware.detection import device_count, has_gpu_driver

log = logging.getLogger(__name__)

DTYPES = {schema.Precision.bf16: torch.bfloat16, schema.Precision.fp16: torch.float16}
CPU, SHARD = schema.Device.cpu, schema.Parallel.shard
# torch's default: OMP_NUM_THREADS, or else the number of cores.
CORES = torch.get_num_threads()


@dataclass(frozen=True)
class HardwareProfile:
    """A profile with every ``auto`` decided. ``autocast`` is None for fp32.

    ``search_micro_batch``: search for the micro-batch of each fit.
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
    search_micro_batch: bool = False
    micro_batches: dict[str, int] = field(default_factory=dict)
    profile: bool = False
    shard: bool = False

    def for_stage(self, stage: str) -> "HardwareProfile":
        """The profile of one stage, ``<experiment>/<stage>``, with its smallest micro-batch bound.

        With ``search_micro_batch`` there is no other bound.
        """
        bounds = [n for pattern, n in self.micro_batches.items() if fnmatch(stage, pattern)]
        if self.search_micro_batch or not bounds:
            return self
        return replace(self, micro_batch=min([*bounds, self.micro_batch or bounds[0]]))

    def set_threads(self, parameters: int) -> None:
        """Set the threads of CPU operations for a model of so many parameters.

        Unless the profile sets them, a model below a million parameters gets one: its operations
        are too short to share, and on a busy machine two threads wait for each other.
        """
        torch.set_num_threads(self.threads or (1 if parameters < 1_000_000 else CORES))


@dataclass(frozen=True)
class Mismatch:
    """A setting that this machine cannot follow."""

    problem: str
    remedy: str
    # What is done instead when the profile is not strict.
    fallback: str


@dataclass(frozen=True)
class DeviceChoice:
    """Device and number format for a profile on this machine.

    `reasons` explain what the profile left open, `fallbacks` what is done where the profile does
    not match; `small_memory`: the GPU has less memory than the profile is made for.
    """

    device: torch.device
    precision: schema.Precision
    tf32: bool
    small_memory: bool
    reasons: dict[str, str]
    fallbacks: list[str]


def resolve(settings: schema.Hardware) -> HardwareProfile:
    """Decide what the profile leaves open, configure torch, and log what was chosen."""
    chosen = choose_device(settings)
    for line in chosen.fallbacks:
        log.warning("%s", line)
    given = settings.micro_batch
    if chosen.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if chosen.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = chosen.tf32
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    search = given == schema.AUTO or (chosen.small_memory and settings.parallel is not SHARD)
    hardware = HardwareProfile(
        device=chosen.device,
        precision=chosen.precision,
        autocast=DTYPES.get(chosen.precision),
        tf32=chosen.tf32,
        threads=settings.threads,
        micro_batch=given if isinstance(given, int) else None,
        search_micro_batch=search,
        micro_batches=settings.micro_batches,
        workers=min(8, CORES // 2) if settings.workers is None else settings.workers,
        pin_memory=settings.pin_memory,
        compile=settings.compile,
        activation_checkpointing=settings.activation_checkpointing,
        profile=settings.profile,
        shard=settings.parallel is SHARD,
    )
    log.info("hardware: %s", describe(hardware, chosen.reasons))
    return hardware


def describe(hardware: HardwareProfile, reasons: dict[str, str]) -> str:
    """One line: what was chosen, and why where the profile left it open."""
    if hardware.device.type == "cuda":
        name = f"{torch.cuda.get_device_name()} ({gigabytes():.0f} GB)"
    else:
        name = "cpu" + reasons.get("device", "")
    threads = hardware.threads or f"1 or {CORES} by size of model"
    limit = f"at most {hardware.micro_batch}" if hardware.micro_batch else "whole batches"
    parts = [
        name,
        hardware.precision + reasons.get("precision", ""),
        *(["TF32"] if hardware.tf32 else []),
        f"threads {threads}",
        f"loader workers {hardware.workers}",
        "micro-batch by a search" if hardware.search_micro_batch else limit,
    ]
    return ", ".join(parts)


def gigabytes() -> float:
    """Memory of the GPU in GB of 10^9 bytes; a card of "80 GB" has slightly more."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9


# ------------------------------------------------------------------ choosing a device


def choose_device(settings: schema.Hardware) -> DeviceChoice:
    """Choose device and number format.

    UserError for a profile that this machine cannot follow, unless ``strict`` is false.
    """
    available = has_gpu_driver() and torch.cuda.is_available()
    use_gpu = available and settings.device is not CPU
    mismatches = _device_mismatches(settings, available, use_gpu)
    if settings.device is schema.Device.cuda and not available:
        settings = replace(settings, precision=schema.Precision.fp32)
    bf16 = use_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision, unsupported = _choose_precision(settings.precision, use_gpu, bf16)
    memory = settings.min_memory_gb
    small = use_gpu and memory is not None and gigabytes() < memory
    mismatches += unsupported
    if memory is not None and small:
        mismatches.append(small_gpu(memory, settings.parallel is SHARD))
    if mismatches and settings.strict:
        raise UserError(f"{mismatches[0].problem}; {mismatches[0].remedy}")
    reasons = {}
    if use_gpu and settings.precision is schema.Precision.auto:
        reasons["precision"] = f" (the GPU has {'it' if bf16 else 'no bf16'})"
    if not available and settings.device is not CPU:
        reasons["device"] = " (torch finds no GPU)"
    reduced = precision is not schema.Precision.fp32
    return DeviceChoice(
        device=torch.device("cuda" if use_gpu else "cpu"),
        precision=precision,
        tf32=use_gpu and (reduced if settings.tf32 is None else settings.tf32),
        small_memory=small,
        reasons=reasons,
        fallbacks=[f"{each.problem}: {each.fallback}" for each in mismatches],
    )


def _device_mismatches(settings: schema.Hardware, available: bool, use_gpu: bool) -> list[Mismatch]:
    """Device settings that this machine cannot satisfy."""
    mismatches = []
    if settings.device is schema.Device.cuda and not available:
        mismatches.append(NO_GPU)
    if settings.gpu_ids is not None and not use_gpu:
        mismatches.append(unused_gpu_ids(settings.gpu_ids))
    started = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    wanted = max(device_count(settings), started)
    count = torch.cuda.device_count() if use_gpu else 0
    if use_gpu and count < started:
        raise UserError(f"{started} processes were started, but torch finds {count} GPUs")
    # Without a GPU several processes share the CPU; with strict=false there is one.
    single = wanted > 1 and not settings.strict and settings.device is not CPU
    if count < wanted and (use_gpu or single):
        mismatches.append(too_few_gpus(wanted, count))
    return mismatches


def _choose_precision(
    precision: schema.Precision, use_gpu: bool, bf16: bool
) -> tuple[schema.Precision, list[Mismatch]]:
    """The number format to use, and why it is not the one in the settings."""
    if precision is schema.Precision.auto:
        return (schema.Precision.bf16 if bf16 else schema.Precision.fp32), []
    if precision is schema.Precision.fp16 and not use_gpu:
        return schema.Precision.fp32, [NO_FP16]
    if precision is schema.Precision.bf16 and use_gpu and not bf16:
        return schema.Precision.fp32, [NO_BF16]
    return precision, []


NO_GPU = Mismatch(
    "hardware.device=cuda, but torch finds no GPU",
    "set hardware.device=cpu, or hardware.strict=false to fall back to it",
    "using the CPU in fp32",
)
NO_FP16 = Mismatch(
    "hardware.precision=fp16 needs a GPU",
    "set it to bf16 or fp32",
    "using fp32",
)
NO_BF16 = Mismatch(
    "hardware.precision=bf16 is not supported by this GPU",
    "set it to fp16 or fp32",
    "using fp32",
)


def too_few_gpus(wanted: int, count: int) -> Mismatch:
    """There are fewer GPUs than processes."""
    found = f"{count} GPU{'s' * (count != 1)}" if count else "no GPU"
    return Mismatch(
        f"hardware.devices={wanted}, but torch finds {found}",
        f"set it to {count}, or set hardware.device=cpu or hardware.strict=false",
        f"using {max(count, 1)} process{'es' * (count > 1)}",
    )


def unused_gpu_ids(ids: list[int]) -> Mismatch:
    """GPUs are given by number, but none is used."""
    return Mismatch(
        f"hardware.gpu_ids={ids}, but no GPU is used",
        "leave it out",
        "ignoring it",
    )


def small_gpu(wanted: float, sharded: bool) -> Mismatch:
    """The GPU has less memory than the profile is made for."""
    fallback = "the micro-batch as it is" if sharded else "hardware.micro_batch=auto"
    return Mismatch(
        f"this profile is for a GPU of {wanted:g} GB, and {torch.cuda.get_device_name()} has "
        f"{gigabytes():.0f}",
        "choose another hardware=, or set hardware.strict=false",
        f"using {fallback}",
    )
