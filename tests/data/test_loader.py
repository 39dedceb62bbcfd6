import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch, View
from stagesweep.data.loader import LoaderView

N = 23
CPU = torch.device("cpu")
PIXELS = torch.randn(N, 3, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(N) % 3


class Samples:
    """Items of PIXELS; records which were read (in this process)."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read.append(index)
        return {"pixels": PIXELS[index]}


class Broken(Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 9:
            raise UserError("cannot read scan_9.png: give data.path another folder")
        return super().__getitem__(index)


class Deadly(Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Faulty(Samples):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        raise self.error


def pair(workers: int) -> tuple[View, LoaderView]:
    """The same data in memory and through the loader."""
    view = View({"pixels": PIXELS, "label": LABELS})
    return view, LoaderView(Samples(), {"label": LABELS}).prepare(CPU, workers)


def same(first: Iterator[Batch], second: Iterator[Batch]) -> int:
    """Compare two streams of batches; returns their number."""
    count = 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, column in one.items():
            torch.testing.assert_close(column, other[name], rtol=0, atol=0)
        count += 1
    return count


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_the_same_batches_as_in_memory_from_any_start(workers: int, start: int) -> None:
    view, loader = pair(workers)
    orders = [v.order(5, torch.Generator().manual_seed(3)) for v in (view, loader)]
    assert same(view.gather(orders[0], start), loader.gather(orders[1], start)) == 5 - start


@pytest.mark.parametrize("workers", [0, 1])
def test_the_whole_split_in_order(workers: int) -> None:
    view, loader = pair(workers)
    assert same(view.batches(10), loader.batches(10)) == 3


def test_columns_are_known_without_reading_and_samplers_see_them() -> None:
    _, loader = pair(0)

    def by_label(view: View, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        return iter(view["label"].argsort(stable=True).split(size))

    order = list(loader.order(8, torch.Generator(), by_label))
    assert len(loader) == N
    assert "label" in loader
    assert "pixels" not in loader
    assert isinstance(loader.samples, Samples)
    assert loader.samples.read == []
    batch = next(loader.gather(order))
    assert batch["label"].tolist() == [0] * 8
    assert loader.samples.read == batch["index"].tolist()


def test_a_split_without_columns_has_rows() -> None:
    (batch,) = LoaderView(Samples()).batches(100)
    assert batch["index"].tolist() == list(range(N))
    torch.testing.assert_close(batch["pixels"], PIXELS)


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_not_advanced(workers: int) -> None:
    _, loader = pair(workers)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(loader.batches(4))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_of_a_sample_arrives_as_one_line(workers: int) -> None:
    loader = LoaderView(Broken()).prepare(CPU, workers)
    with pytest.raises(UserError, match=r"^cannot read scan_9.png: give data.path another folder$"):
        list(loader.batches(4))


def test_the_death_of_a_worker_is_one_line() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    loader = LoaderView(Deadly()).prepare(CPU, workers=1)
    with pytest.raises(UserError) as caught:
        list(loader.batches(4))
    assert str(caught.value).startswith("a loader process died, most often for want of memory: ")
    assert str(caught.value).endswith("lower hardware.workers=1; 0 reads without processes")
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError, EOFError, KeyError])
def test_a_bug_in_the_data_set_keeps_its_error(workers: int, kind: type[Exception]) -> None:
    loader = LoaderView(Faulty(kind("a mistake in the data set"))).prepare(CPU, workers)
    with pytest.raises(kind, match="a mistake in the data set"):
        list(loader.batches(4))


def test_workers_ignore_ctrl_c(tmp_path: Path) -> None:
    class Tells(Samples):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    assert same(View({"pixels": PIXELS}).batches(6), LoaderView(Tells()).prepare(CPU, 1).batches(6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_pinned() -> None:
    loader = LoaderView(Samples()).prepare(torch.device("cuda"), workers=1)
    assert all(batch["pixels"].is_pinned() for batch in loader.batches(8))
