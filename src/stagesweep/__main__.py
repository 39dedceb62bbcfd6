"""``python -m stagesweep`` is the ``stagesweep`` command."""

from stagesweep.cli import main

# Processes of trials import this module under another name, and must not start the command.
if __name__ == "__main__":
    main()
