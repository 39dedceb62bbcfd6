"""Benchmarks of the mixture of experts on Whisper.

    python -m benchmarks.speech routed      training step with 2 of 8 experts, and with all experts
    python -m benchmarks.speech states      training step of experts, with and without the encoder
    python -m benchmarks.speech features    reading clips without and with the cache of features
    python -m benchmarks.speech extract     peak memory of the extraction of 500 and 5,000 clips

`--small` takes seconds. Variants take turns in one process and ratios are medians over rounds, so
other load of the machine affects all variants.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import choose
from benchmarks.singlecell import turns
from stagesweep.base.spec import Features
from stagesweep.core.optim import freeze
from stagesweep.systems.speech.data.dataset import Columns, Speech
from stagesweep.systems.speech.data.tokens import SpeechSpec, Tokens
from stagesweep.systems.speech.loss import TokenCrossEntropy
from stagesweep.systems.speech.model.build import whisper_tiny
from stagesweep.systems.speech.model.mixture import MixtureWhisper

ADAPTERS = ["gate.*", "*.A.*", "*.B.*"]
BANDS = 80


def model(options: argparse.Namespace, frames: int, tokens: int) -> MixtureWhisper:
    """Build eight experts of rank 16, two for a clip, on a Whisper with random weights."""
    spec = SpeechSpec(
        {"mel": Features(tuple(map(str, range(BANDS))))},
        labels={"speaker": 1, "stratum": 1},
        frames=frames,
        tokens=Tokens(1000, 0, 1, (2,), tokens),
    )
    width, layers = (32, 1) if options.small else (256, 4)
    torch.manual_seed(0)
    built = whisper_tiny(
        spec, width=width, heads=4, encoder_layers=layers, decoder_layers=layers,
        experts=8, k=2, rank=16, alpha=32.0, hidden=128,
    )  # fmt: skip
    freeze(built, ADAPTERS, [])
    built.train()
    built.whisper.model.encoder.eval()
    built.phase = "topk"
    return built


def clips(built: MixtureWhisper, size: int, frames: int, tokens: int) -> dict[str, Tensor]:
    """Return a batch of noise."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (size, tokens), generator=random)
    mel = torch.randn((size, BANDS, frames), generator=random)
    batch = {"mel": mel, "frames": torch.full((size,), frames), "tokens": text, "labels": text}
    return batch | {"states": built.encode(batch)}


def train(built: MixtureWhisper, batch: dict[str, Tensor], all_rows: bool = False) -> None:
    """Run forward and backward."""
    built.zero_grad()
    built.all_rows = all_rows
    total, weight = TokenCrossEntropy()(built(batch), batch)
    (total / weight).backward()


def report(steps: Mapping[str, Callable[[], object]], rounds: int, against: str) -> None:
    """Print the median of each step, and its speed relative to `against`."""
    for name, (median, ratio) in turns(dict(steps), rounds, against).items():
        print(f"{name:24}{median * 1e3:10.1f} ms   {1 / ratio:7.2f} x as fast", flush=True)


def routed(options: argparse.Namespace) -> None:
    """Forward and backward on given encoder states; the bound is 8 / 2."""
    size, frames, tokens = (4, 40, 8) if options.small else (16, 200, 24)
    built = model(options, frames, tokens)
    batch = clips(built, size, frames, tokens)
    del batch["mel"]
    steps = {
        "all 8 experts": lambda: train(built, batch, all_rows=True),
        "2 of 8 experts": lambda: train(built, batch),
    }
    report(steps, options.rounds, "all 8 experts")


def states(options: argparse.Namespace) -> None:
    """Forward and backward with one expert per clip, and long windows as those of Whisper."""
    size, frames, tokens = (4, 40, 8) if options.small else (8, 1000, 24)
    built = model(options, frames, tokens)
    batch = clips(built, size, frames, tokens) | {"expert": torch.arange(size) % 8}
    without_mel = {name: column for name, column in batch.items() if name != "mel"}
    without_states = {name: column for name, column in batch.items() if name != "states"}
    steps = {
        "from features": lambda: train(built, without_states),
        "from states": lambda: train(built, without_mel),
    }
    report(steps, options.rounds, "from features")


def features(options: argparse.Namespace) -> None:
    """Read clips of 1 s at 44.1 kHz; each round has its own cache."""
    count = 20 if options.small else 200
    with tempfile.TemporaryDirectory() as folder:
        data = recordings(Path(folder), count, seconds=1.0, rate=44100)
        number = iter(range(10**6))

        def read(fresh: bool) -> None:
            if fresh:
                cache = Path(folder) / f"cache_{next(number)}"
                object.__setattr__(data._features, "cache", cache)
            for split in data.splits:
                for _ in data.split(split).batches(64):
                    pass

        steps = {"first time": lambda: read(True), "second time": lambda: read(False)}
        report(steps, min(options.rounds, 7), "first time")


def recordings(folder: Path, count: int, seconds: float, rate: int) -> Speech:
    """Write .wav files of noise and `table.csv`, and read them as data."""
    import soundfile

    random = np.random.default_rng(0)
    lines = ["path,transcript,speaker"]
    for number in range(count):
        wave = random.normal(0, 0.1, round(seconds * rate))
        soundfile.write(folder / f"{number}.wav", wave, rate)
        lines.append(f"{number}.wav,{'yes' if number % 2 else 'no'},s{number % 10}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    os.environ["STAGESWEEP_FEATURES"] = str(folder / "features")
    columns = Columns("transcript", path="path", speaker="speaker")
    return Speech(str(folder / "table.csv"), columns, bands=BANDS, seconds=max(seconds, 0.3))


def extract(options: argparse.Namespace) -> None:
    """Run the command with only this stage, in a new process for each size."""
    peaks = []
    for count in (20, 60) if options.small else (500, 5000):
        with tempfile.TemporaryDirectory() as folder:
            recordings(Path(folder), count, seconds=0.3, rate=8000)
            peaks.append(peak(Path(folder)))
            print(f"{count:6,} clips: peak {peaks[-1]:7.1f} MiB", flush=True)
    print(f"growth {peaks[1] - peaks[0]:+.1f} MiB")


def peak(folder: Path) -> float:
    """Return the peak memory in MiB of a command that extracts the clips of a table."""
    stages = ("base", "cluster", "gate", "experts", "asr", "baselines", "evaluate", "figures")
    words = ["experiment=speech", "data=speech", f"data.path={folder}/table.csv"]
    words += [*(f"~stage.{name}" for name in stages), "objective.metric=extract/clips"]
    words += ["data.seconds=0.3", "stage.extract.states=true", "hardware=cpu"]
    words += ["hardware.workers=0", f"hydra.run.dir={folder}/run"]
    environment = os.environ | {"STAGESWEEP_STORE": f"{folder}/store"}
    process = subprocess.Popen(
        [sys.executable, "-m", "stagesweep", *words],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    output = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the command failed: {output[-600:]}")
    return usage.ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark, or all."""
    benchmarks = {"routed": routed, "states": states, "features": features, "extract": extract}
    choose.run(choose.parser(__doc__, benchmarks), benchmarks, arguments)


if __name__ == "__main__":
    main()
