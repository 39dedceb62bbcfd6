"""The mixture of experts on Whisper: what routing, kept features and kept states save, and in how
little memory clips are extracted.

    python -m benchmarks.speech routed      a training step by chosen experts beside all experts
    python -m benchmarks.speech states      a training step of an expert, with and without encoder
    python -m benchmarks.speech features    reading clips for the first and for the second time
    python -m benchmarks.speech extract     peak memory of the stage at 500 and at 5,000 clips

`--small` takes seconds. What is compared takes turns in one process, and ratios are medians of
those of a turn, so that whatever else the machine does falls on all.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    """Eight experts of rank 16, two for a clip, on a Whisper of random weights."""
    spec = SpeechSpec(
        {"mel": Features(tuple(map(str, range(BANDS))))},
        labels={"speaker": 1, "stratum": 1},
        frames=frames,
        tokens=Tokens(1000, 0, 1, (2,), tokens),
    )
    width, layers = (32, 1) if options.small else (256, 4)
    torch.manual_seed(0)
    found = whisper_tiny(
        spec, width=width, heads=4, encoder_layers=layers, decoder_layers=layers,
        experts=8, k=2, rank=16, alpha=32.0, hidden=128,
    )  # fmt: skip
    freeze(found, ADAPTERS, [])
    found.train()
    found.whisper.model.encoder.eval()
    found.phase = "topk"
    return found


def clips(made: MixtureWhisper, size: int, frames: int, tokens: int) -> dict[str, Tensor]:
    """A batch of noise."""
    random = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (size, tokens), generator=random)
    mel = torch.randn((size, BANDS, frames), generator=random)
    batch = {"mel": mel, "frames": torch.full((size,), frames), "tokens": text, "labels": text}
    return batch | {"states": made.encode(batch)}


def train(made: MixtureWhisper, batch: dict[str, Tensor], all_rows: bool = False) -> None:
    """Forward and backward."""
    made.zero_grad()
    made.all_rows = all_rows
    total, weight = TokenCrossEntropy()(made(batch), batch)
    (total / weight).backward()


def report(steps: Mapping[str, Callable[[], object]], rounds: int, against: str) -> None:
    """Medians of each, and how many times faster than `against`."""
    for name, (median, ratio) in turns(dict(steps), rounds, against).items():
        print(f"{name:24}{median * 1e3:10.1f} ms   {1 / ratio:7.2f} x as fast", flush=True)


def routed(options: argparse.Namespace) -> None:
    """Forward and backward on states that are there already: the bound is 8 / 2."""
    size, frames, tokens = (4, 40, 8) if options.small else (16, 200, 24)
    made = model(options, frames, tokens)
    batch = clips(made, size, frames, tokens)
    del batch["mel"]
    steps = {
        "all 8 experts": lambda: train(made, batch, all_rows=True),
        "2 of 8 experts": lambda: train(made, batch),
    }
    report(steps, options.rounds, "all 8 experts")


def states(options: argparse.Namespace) -> None:
    """Forward and backward of clips of one expert each; the window is long, as Whisper's is."""
    size, frames, tokens = (4, 40, 8) if options.small else (8, 1000, 24)
    made = model(options, frames, tokens)
    batch = clips(made, size, frames, tokens) | {"expert": torch.arange(size) % 8}
    kept = {name: column for name, column in batch.items() if name != "mel"}
    heard = {name: column for name, column in batch.items() if name != "states"}
    steps = {"from features": lambda: train(made, heard), "from states": lambda: train(made, kept)}
    report(steps, options.rounds, "from features")


def features(options: argparse.Namespace) -> None:
    """Clips of a second at 44.1 kHz, each turn with a cache of its own."""
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
    """A table of noise in .wav files, `table.csv`, read as data."""
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
    """The real command, with this stage alone, in a process of its own for each size."""
    peaks = []
    for count in (20, 60) if options.small else (500, 5000):
        with tempfile.TemporaryDirectory() as folder:
            recordings(Path(folder), count, seconds=0.3, rate=8000)
            peaks.append(peak(Path(folder)))
            print(f"{count:6,} clips: peak {peaks[-1]:7.1f} MiB", flush=True)
    print(f"growth {peaks[1] - peaks[0]:+.1f} MiB")


def peak(folder: Path) -> float:
    """Peak memory in MiB of a command that extracts the clips of a table."""
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
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the command did not run: {said[-600:]}")
    return usage.ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> None:
    """Run one of them, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    benchmarks: dict[str, Callable[[argparse.Namespace], Any]] = {
        "routed": routed, "states": states, "features": features, "extract": extract,
    }  # fmt: skip
    parser.add_argument("name", choices=[*benchmarks, "all"], nargs="?", default="all")
    parser.add_argument("--small", action="store_true", help="a smoke run")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    options.rounds = 3 if options.small else options.rounds
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    for name, run in benchmarks.items():
        if options.name in (name, "all"):
            print(f"== {name}")
            run(options)


if __name__ == "__main__":
    main()
