"""Profiles a few steps of a fit with torch's profiler, for ``hardware.profile=true``."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from stagesweep.base.files import atomic_text, atomic_write
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.hardware.throughput import Throughput

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# Steps to skip (the first are slower), steps to trace, and operators to show.
WARMUP, STEPS, SHOWN = 3, 5, 14
# The profiler's name for a step; its own time is spent between operators.
STEP = "ProfilerStep*"


@contextmanager
def tracing(
    hardware: HardwareProfile, throughput: Throughput, folder: Path, name: str
) -> Iterator[None]:
    """Trace the fit that `throughput` measures, if the hardware profile has ``profile: true``.

    Writes to `folder`: ``<name>.json.gz`` (for chrome://tracing or ui.perfetto.dev),
    ``<name>.md`` and ``<name>.png``.
    """
    if not hardware.profile:
        yield
        return
    # (time, seconds waited for data) after each step.
    ticks: list[tuple[float, float]] = []

    def write(profiler: profile) -> None:
        if len(ticks) <= WARMUP:
            return
        (start, waited_before), (end, waited) = ticks[WARMUP - 1], ticks[-1]
        summary = TraceSummary.from_profiler(
            profiler, len(ticks) - WARMUP, end - start, waited - waited_before
        )
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
        atomic_text(folder / f"{name}.md", summary.page(name))
        atomic_write(folder / f"{name}.png", lambda stream: summary.figure(name).savefig(stream))
        log.info("%s: %s; see profile/%s.md of the stage", name, summary.sentence(), name)

    activities = [ProfilerActivity.CPU]
    if hardware.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    steps = schedule(wait=0, warmup=WARMUP, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:

        def step() -> None:
            if len(ticks) < WARMUP + STEPS:
                ticks.append((perf_counter(), throughput.total.waited + throughput.epoch.waited))
                profiler.step()

        throughput.after_step = step
        yield
    if len(ticks) <= WARMUP:
        log.warning("%s: no trace: it has %d steps, a trace needs %d", name, len(ticks), WARMUP + 1)


@dataclass
class TraceSummary:
    """Where the time of some steps went.

    Seconds in all, waiting for data, between operators, and of a busy GPU (None: there is none);
    (calls, seconds) of each operator.
    """

    steps: int
    seconds: float
    waited: float
    between: float
    gpu: float | None
    operators: dict[str, tuple[int, float]]

    @classmethod
    def from_profiler(
        cls, profiler: profile, steps: int, seconds: float, waited: float
    ) -> "TraceSummary":
        """Summarize a trace; operators count on the GPU if there is one, else on the CPU."""
        found = profiler.key_averages()
        on_gpu = torch.cuda.is_available() and any(each.self_device_time_total for each in found)
        own = {
            each.key: (
                each.count,
                (each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e6,
            )
            for each in found
            if not each.key.startswith("ProfilerStep")
        }
        ordered = sorted(own.items(), key=lambda pair: -pair[1][1])
        return cls(
            steps=steps,
            seconds=seconds,
            waited=waited,
            between=sum(e.self_cpu_time_total for e in found if e.key == STEP) / 1e6,
            gpu=sum(spent for _, spent in own.values()) if on_gpu else None,
            operators={name: pair for name, pair in ordered if pair[1] > 0},
        )

    def bars(self) -> dict[str, dict[str, float]]:
        """Shares of the time, split in up to three ways."""
        wait, between = self.waited / self.seconds, min(self.between / self.seconds, 1.0)
        bars = {
            "loop": {"waiting for data": wait, "steps": 1 - wait},
            "CPU": {"operators": 1 - between, "between them (Python)": between},
        }
        if self.gpu is not None:
            busy = min(self.gpu / self.seconds, 1.0)
            bars["GPU"] = {"busy": busy, "idle": 1 - busy}
        return bars

    def sentence(self) -> str:
        """The shares in one line."""
        each = 1e3 * self.seconds / self.steps
        parts = (
            f"{part} {share:.0%}" for bar in self.bars().values() for part, share in bar.items()
        )
        return f"{each:.1f} ms a step: {', '.join(parts)}"

    def page(self, name: str) -> str:
        """The summary as a Markdown page."""
        rows = [
            f"| `{operator}` | {calls / self.steps:.0f} | {1e3 * spent / self.steps:.3f} | "
            f"{spent / self.seconds:.1%} |"
            for operator, (calls, spent) in list(self.operators.items())[:SHOWN]
        ]
        bars = [
            f"* {bar}: " + ", ".join(f"{part} {share:.1%}" for part, share in parts.items())
            for bar, parts in self.bars().items()
        ]
        lines = [
            f"# Where the time of `{name}` goes",
            "",
            f"{self.steps} steps after {WARMUP} warm-up steps, "
            f"{1e3 * self.seconds / self.steps:.2f} ms each. Tracing slows them down.",
            "",
            *bars,
            "",
            f"Operators by their own time on the {'CPU' if self.gpu is None else 'GPU'}; the whole "
            f"trace is in `{name}.json.gz` (chrome://tracing, ui.perfetto.dev).",
            "",
            "| operator | calls a step | ms a step | share |",
            "|---|---|---|---|",
            *rows,
        ]
        return "\n".join(lines) + "\n"

    def figure(self, name: str) -> "Figure":
        """The summary as a figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), layout="constrained", dpi=120)
        upper, lower = figure.subplots(2, 1, height_ratios=[1, 3.2])
        bars, colours = self.bars(), ("#4269d0", "#c9d3ee")
        for row, parts in enumerate(bars.values()):
            left = 0.0
            for colour, share in zip(colours, parts.values(), strict=True):
                upper.barh(row, share, left=left, color=colour, height=0.7)
                left += share
            upper.text(0.99, row, labelled(parts, -1), ha="right", va="center")
        upper.set_yticks(
            range(len(bars)), [f"{bar}: {labelled(parts, 0)}" for bar, parts in bars.items()]
        )
        upper.set(xlim=(0, 1), xticks=[], title=f"{name}: {self.steps} steps of "
                  f"{1e3 * self.seconds / self.steps:.1f} ms")  # fmt: skip
        upper.invert_yaxis()
        top = list(self.operators.items())[:SHOWN]
        names = [operator[:60] for operator, _ in top]
        lower.barh(names, [100 * spent / self.seconds for _, (_, spent) in top], color=colours[0])
        lower.invert_yaxis()
        where = "CPU" if self.gpu is None else "GPU"
        lower.set_xlabel(f"% of the time: operator's own time on the {where}")
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def labelled(parts: dict[str, float], index: int) -> str:
    """Name and share of one part."""
    part, share = list(parts.items())[index]
    return f"{part} {share:.0%}"
