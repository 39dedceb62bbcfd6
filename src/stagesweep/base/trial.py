"""The trial protocol: a fit reports its metrics to the sweep, which may ask it to stop."""

from collections.abc import Mapping


class Trial:
    """A trial outside any sweep: reports go nowhere. In a sweep, see ``sweep.engine.pipe``."""

    def report(
        self, stage: str, metrics: Mapping[str, float], step: int, of: int | None = None
    ) -> None:
        """Report the metrics of a stage after epoch ``step`` of ``of``."""

    def should_stop(self) -> bool:
        """Whether the sweep prunes this run."""
        return False


_current = Trial()


def current() -> Trial:
    """The trial that this process runs; outside a sweep, one whose reports go nowhere."""
    return _current


def set_current(trial: Trial) -> None:
    """Set the trial that this process runs."""
    global _current
    _current = trial
