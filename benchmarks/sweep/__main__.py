"""``python -m benchmarks.sweep <name>``: run one benchmark of the sweep engine."""

import sys
from importlib import import_module

from benchmarks.sweep.lab import NAMES


def main() -> int:
    """Run the named benchmark; exit status 1 if one of its checks fails."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        print(f"usage: python -m benchmarks.sweep {{{','.join(NAMES)}}} [--small]", file=sys.stderr)
        return 2
    status: int = import_module(f"benchmarks.sweep.{name}").main(sys.argv[2:])
    return status


if __name__ == "__main__":
    sys.exit(main())
