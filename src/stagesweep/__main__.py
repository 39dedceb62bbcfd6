"""``python -m stagesweep`` is the ``stagesweep`` command."""

from stagesweep.cli import main

# The processes of a sweep's trials import this module under another name.
if __name__ == "__main__":
    main()
