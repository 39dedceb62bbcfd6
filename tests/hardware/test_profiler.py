import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stagesweep.core.fit import Loop
from stagesweep.hardware.profiler import STEPS, WARMUP, TraceSummary, tracing

if TYPE_CHECKING:
    from fits import Bench


def traced(loop: Loop, folder: Path, on: bool = True) -> None:
    with tracing(replace(loop.hardware, profile=on), loop.throughput, folder, "fit"):
        loop.run()


def test_trace_page_and_figure_are_written(bench: "Bench", tmp_path: Path) -> None:
    loop = bench.loop(epochs=3)
    traced(loop, tmp_path / "profile")
    assert loop.state.step > WARMUP + STEPS
    with gzip.open(tmp_path / "profile" / "fit.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    steps = {e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{number}" for number in range(WARMUP, WARMUP + STEPS)}
    page = (tmp_path / "profile" / "fit.md").read_text()
    assert f"{STEPS} steps after {WARMUP} warm-up steps" in page
    assert "| `aten::addmm` | " in page
    assert (tmp_path / "profile" / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_profiling_changes_no_result(bench: "Bench", tmp_path: Path) -> None:
    plain, loop = bench.loop(name="plain"), bench.loop(name="traced")
    plain.run()
    traced(loop, tmp_path / "profile")
    assert loop.state.summary == plain.state.summary


def test_nothing_is_written_without_profiling(bench: "Bench", tmp_path: Path) -> None:
    traced(bench.loop(), tmp_path / "profile", on=False)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", [1, WARMUP])
def test_a_fit_with_too_few_steps_logs_that_it_has_no_trace(
    bench: "Bench", tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    traced(bench.loop(epochs=1, batch_size=-(-44 // steps)), tmp_path / "profile")
    assert caplog.messages[-1] == f"fit: no trace: it has {steps} steps, a trace needs {WARMUP + 1}"
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("gpu", [None, 0.5])
def test_shares_are_of_the_elapsed_time(gpu: float | None) -> None:
    found = TraceSummary(4, 2.0, 0.5, 0.25, gpu, {"aten::mm": (8, 0.5)})
    bars = found.bars()
    assert list(bars) == ["loop", "CPU"] + ["GPU"] * (gpu is not None)
    assert [sum(parts.values()) for parts in bars.values()] == pytest.approx([1.0] * len(bars))
    assert bars["loop"]["waiting for data"] == 0.25
    assert "| `aten::mm` | 2 | 125.000 | 25.0% |" in found.page("fit")
    assert found.sentence().startswith("500.0 ms a step: waiting for data 25%, steps 75%")
    figure = found.figure("fit")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "loop: waiting for data 25%"
    assert labels[-1] == ("CPU: operators 88%" if gpu is None else "GPU: busy 25%")
