"""The hardware benchmarks run; their figures mean something only on a GPU."""

import re
from pathlib import Path

import pytest
import torch

from stagesweep.config import register, schema


def test_a_smoke_run_of_the_gpu_benchmark_fills_its_tables(tmp_path: Path) -> None:
    from benchmarks.gpu import main

    page = tmp_path / "page.md"
    assert main(["--device", "cpu", "--small", "--output", str(page)]) == 0
    text = page.read_text()
    for file in (register.folder() / "experiment").glob("*.yaml"):
        row = rf"^\| {file.stem}(, \w+ \| \d+( \| [\d,]+)+ \|| \| needs `--data .*)$"
        assert re.search(row, text, re.MULTILINE), file.stem
    assert re.search(r"^\| digits, pretrain \| 16 \| [\d,]+ \| [\d,]+ \|$", text, re.MULTILINE)
    assert "micro-batch 400 → 200" in text
    assert "survived" in text
    assert re.search(r"^\| DataLoader, 0 workers \| [\d,]+ \|$", text, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_a_missing_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu import main

    assert main([]) == 1
    assert capsys.readouterr().out == (
        "bench-gpu: torch finds no GPU; --device cpu --small tries the benchmark itself\n"
    )


def test_recipes_save_memory_and_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import memory

    recipes = ("plain", "activations recomputed")
    peaks, losses = zip(
        *(memory.measure(name, schema.Device.cpu, 64, 400, rounds=1)[:2] for name in recipes),
        strict=True,
    )
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert peaks[1] < 0.9 * peaks[0]
