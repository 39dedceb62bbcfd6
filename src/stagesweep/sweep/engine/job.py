"""Jobs of a sweep, and the events that a backend yields about them."""

from dataclasses import dataclass

from stagesweep.sweep.study.states import Outcome


@dataclass
class Job:
    """One run of a trial: its folder below the sweep's, its overrides, its timeout in seconds."""

    number: int
    subdir: str
    overrides: list[str]
    timeout: float | None = None
    repeat: int = 0
    # Set by the backend: why it stops the job ("timeout" or "interrupted"), and when it does
    # (time.monotonic()).
    stop_reason: str | None = None
    deadline: float = float("inf")

    def outcome_when_stopped(self) -> Outcome:
        """The outcome of a job that ended because its backend stopped it."""
        if self.stop_reason == "timeout":
            return Outcome("failed", None, "timeout", f"ran longer than {self.timeout:g} s")
        return Outcome("interrupted")


@dataclass(frozen=True)
class Report:
    """An intermediate value; the job waits for `Backend.answer`."""

    job: Job
    value: float
    step: int


@dataclass(frozen=True)
class Progress:
    """The current stage and epoch of a job, as text."""

    job: Job
    text: str


@dataclass(frozen=True)
class Finished:
    """The end of a job."""

    job: Job
    outcome: Outcome


JobEvent = Report | Progress | Finished
