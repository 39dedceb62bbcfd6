"""``python -m stagesweep`` is the ``stagesweep`` command."""

from stagesweep.cli import main

main()
