"""Sums gradients over processes while the backward pass is still running."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from stagesweep.parallel.process_group import ProcessGroup

# Bytes in a bucket, as in torch's DistributedDataParallel.
BUCKET = 25 * 2**20


class GradientExchange:
    """Gradients of a replicated model, summed over the processes of a `group`.

    ``.grad`` of the parameters are views of a few long tensors, the buckets. A bucket is sent as
    soon as it is complete. Backward passes reach parameters in about the reverse of their order, so
    most buckets travel while the rest is computed (Li et al. 2020, arXiv:2006.15704). All processes
    send all buckets in one order, even when a pass fails: none waits in vain, and all can repeat
    the step.
    """

    def __init__(self, group: ProcessGroup, parameters: Sequence[nn.Parameter]) -> None:
        self.group, self.parameters = group, parameters
        self.buckets = list(_buckets(parameters[::-1]))
        self.flat = [
            bucket[0].new_zeros(sum(parameter.numel() for parameter in bucket))
            for bucket in self.buckets
        ]
        self.bucket_of: dict[Tensor, int] = {
            p: n for n, bucket in enumerate(self.buckets) for p in bucket
        }
        self.reached: set[Tensor] = set()
        # For each bucket, the parameters that the last backward pass has not reached yet.
        self.missing: list[set[Tensor]] = []
        self.sent: list[Callable[[], object]] = []
        self.last = False

    def set_is_last_backward(self, last: bool) -> None:
        """Whether the next backward pass is the last of the step, which sends complete buckets."""
        self.last = last

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Zero the gradients, add those of the backward passes within, and send the sums.

        `wait` must follow.
        """
        self._wait()  # for buckets of a step that failed
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

    def wait(self) -> None:
        """Wait for the sums.

        A gradient that no process has becomes None, so that the optimizer skips the parameter as in
        a single process. One that only some have counts as zero on the others.
        """
        self._wait()
        found = self.group.all_reduce_max(*(int(p in self.reached) for p in self.parameters))
        for parameter, some in zip(self.parameters, found, strict=True):
            if not some:
                parameter.grad = None

    def _reach(self, parameter: Tensor) -> None:
        """Note that the backward pass has the gradient of a parameter."""
        self.reached.add(parameter)
        if self.last:
            self.missing[self.bucket_of[parameter]].discard(parameter)
            self._send_until(next((n for n, left in enumerate(self.missing) if left), None))

    def _send_until(self, end: int | None) -> None:
        for flat in self.flat[len(self.sent) : end]:
            self.sent.append(self.group.all_reduce_async(flat))

    def _wait(self) -> None:
        for wait in self.sent:
            wait()
        self.sent.clear()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbouring parameters of one type, about `BUCKET` bytes in each bucket."""
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
