"""The sum of the gradients over processes, sent while the backward pass still goes on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from stagesweep.parallel.process_group import Team

# Bytes that travel together, as in torch's DistributedDataParallel.
BUCKET = 25 * 2**20


class Gradients:
    """``.grad`` of the parameters of a model that a `team` trains: views of a few long tensors,
    the buckets, each of which is added up over processes as soon as it is complete.

    Backward passes reach parameters in about the reverse of their order, so that most buckets
    travel while the rest is computed (Li et al. 2020, arXiv:2006.15704). They are sent in one
    order by all, and all of them are sent even when the pass fails: no process waits in vain for
    another, and all can start the step again.
    """

    def __init__(self, team: Team, parameters: Sequence[nn.Parameter]) -> None:
        self.team, self.parameters = team, parameters
        self.buckets = list(_buckets(parameters[::-1]))
        self.flat = [
            bucket[0].new_zeros(sum(parameter.numel() for parameter in bucket))
            for bucket in self.buckets
        ]
        self.place: dict[Tensor, int] = {
            p: n for n, bucket in enumerate(self.buckets) for p in bucket
        }
        self.reached: set[Tensor] = set()
        # Of each bucket, those that the last backward pass has not reached so far.
        self.missing: list[set[Tensor]] = []
        self.sent: list[Callable[[], object]] = []
        self.now = False

    def send(self, now: bool) -> None:
        """Whether the next backward pass is the last, and sends what it completes."""
        self.now = now

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Backward passes within add to gradients of zero, and their sum is under way afterwards:
        `settle` waits for it.
        """
        self._wait()  # for what a step that failed has left
        self.reached.clear()
        self.missing = [set(bucket) for bucket in self.buckets]
        for bucket, flat in zip(self.buckets, self.flat, strict=True):
            parts = flat.zero_().split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        hooks = [p.register_post_accumulate_grad_hook(self._reach) for p in self.parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._send_until(None)

    def settle(self) -> None:
        """Wait for the sums.

        A gradient that no process has is None, so that the optimizer leaves the parameter alone as
        it would in one process; elsewhere it counts as zero.
        """
        self._wait()
        there = self.team.most(*(int(p in self.reached) for p in self.parameters))
        for parameter, some in zip(self.parameters, there, strict=True):
            if not some:
                parameter.grad = None

    def _reach(self, parameter: Tensor) -> None:
        """The gradient of a parameter is there, as far as the backward pass goes."""
        self.reached.add(parameter)
        if self.now:
            self.missing[self.place[parameter]].discard(parameter)
            self._send_until(next((n for n, left in enumerate(self.missing) if left), None))

    def _send_until(self, end: int | None) -> None:
        for flat in self.flat[len(self.sent) : end]:
            self.sent.append(self.team.start_sum(flat))

    def _wait(self) -> None:
        for wait in self.sent:
            wait()
        self.sent.clear()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours of one type, about `BUCKET` bytes of them."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size >= BUCKET or parameter.dtype is not bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
