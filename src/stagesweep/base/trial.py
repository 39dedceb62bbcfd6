"""What a fit says to the sweep it belongs to, and may ask it."""

from collections.abc import Mapping


class Trial:
    """Outside a sweep, where nobody listens. In one, ``stagesweep.sweep.engine.pipe`` does."""

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Tell how far a stage is: its metrics after epoch ``step``, and how many there will be."""

    def should_stop(self) -> bool:
        """Whether the sweep has no more use for this run."""
        return False


_current = Trial()


def current() -> Trial:
    """The trial that this process runs, or else one that nobody listens to."""
    return _current


def become(one: Trial) -> None:
    """Make this process that trial."""
    global _current
    _current = one
