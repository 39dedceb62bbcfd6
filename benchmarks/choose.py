"""The command line of a module with several benchmarks."""

import argparse
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Benchmarks = Mapping[str, Callable[[argparse.Namespace], Any]]


def parser(description: str, benchmarks: Benchmarks) -> argparse.ArgumentParser:
    """Options that all of them have: which one, `--small`, `--rounds` and `--threads`."""
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    found.add_argument("name", choices=[*benchmarks, "all"], nargs="?", default="all")
    found.add_argument("--small", action="store_true", help="a smoke run")
    found.add_argument("--rounds", type=int, default=15)
    found.add_argument("--threads", type=int, default=1)
    return found


def run(
    options: argparse.ArgumentParser, benchmarks: Benchmarks, arguments: Sequence[str] | None
) -> None:
    """Run the chosen benchmark, or all."""
    chosen = options.parse_args(arguments)
    chosen.rounds = 3 if chosen.small else chosen.rounds
    torch.set_num_threads(chosen.threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    for name, benchmark in benchmarks.items():
        if chosen.name in (name, "all"):
            print(f"== {name}")
            benchmark(chosen)
