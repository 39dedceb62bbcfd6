"""Try random and damaged inputs for a given time: ``python -m fuzz --seconds 600``."""

import argparse
import gc
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import Warm

from fuzz import commands, readers
from fuzz.commands import Bench
from fuzz.judge import Fault

# A number that asks for all memory is refused by the system, and the machine stays usable.
MEMORY = 16 << 30
READERS = (readers.audiogram, readers.singlecell, readers.speech, readers.audio, readers.features)
COMMANDS = (
    commands.single, commands.configs, commands.stores, commands.data, commands.helps,
    commands.single, commands.weights, commands.configs, commands.sweeps, commands.studies,
    commands.real,
)  # fmt: skip
# A command takes as long as many files that are only read.
READ_EACH = 4


def one(number: int, seed: int, bench: Bench, kinds: Sequence[str]) -> tuple[str, str]:
    """Try the input of that number; return its kind and ``ran``, ``refused`` or ``stopped``."""
    chance = random.Random(f"{seed}/{number}")
    turn, place = divmod(number, READ_EACH * len(READERS) + 1)
    folder = bench.folder / str(number)
    if place:
        kind: Callable[..., Any] = READERS[place % len(READERS)]
    else:
        kind = COMMANDS[turn % len(COMMANDS)]
    if kinds and kind.__name__ not in kinds:
        return kind.__name__, ""
    folder.mkdir()
    try:
        own = readers.read(chance, folder, kind) if place else kind(chance, folder, bench)
    except Fault as fault:
        raise Fault(f"{kind.__name__}, input {number} of seed {seed}: {fault}") from fault
    shutil.rmtree(folder)
    return kind.__name__, own


def fuzz(
    seconds: float, seed: int, folder: Path, first: int = 0, kinds: Sequence[str] = ()
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Try inputs for some seconds; return how many of each kind were answered how, and faults."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    gc.freeze()  # for the forks
    bench = Bench(folder, Warm(folder))
    counts, faults, number = Counter[tuple[str, str]](), list[str](), first
    until = time.monotonic() + seconds
    try:
        while number == first or time.monotonic() < until:
            try:
                counts[one(number, seed, bench, kinds)] += 1
            except Fault as fault:
                faults.append(str(fault))
                print(f"FAULT {fault}\n", flush=True)
            number += 1
    finally:
        bench.warm.server.communicate()
    return counts, faults


def main() -> int:
    """Try inputs and print how many of each kind were tried; the exit status is 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long; 0: one input")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--kinds", nargs="*", default=(), help="only these kinds")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="stagesweep-fuzz-"))
    counts, faults = fuzz(given.seconds, given.seed, folder, given.first, given.kinds)
    for kind in sorted({kind for kind, answer in counts if answer}):
        own = {answer: n for (name, answer), n in sorted(counts.items()) if name == kind}
        print(f"{kind:12} {sum(own.values()):6} {own}")
    total = sum(n for (_, answer), n in counts.items() if answer) + len(faults)
    print(f"{total} inputs, {len(faults)} faults (inputs of faults are in {folder})")
    if not faults:
        shutil.rmtree(folder)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
