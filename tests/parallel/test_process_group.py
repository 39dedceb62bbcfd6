"""Three processes compute the same as one. They start once for all tests; see several.py."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stagesweep.hardware.throughput import SPEED
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(left_by: Callable[[str], Path]) -> Found:
    """Results of each of the three processes."""
    folder = left_by("several")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(3)]


def test_the_gradient_does_not_depend_on_the_division_of_the_batch(found: Found) -> None:
    for each in found:
        assert len(each["gradients"]) == 20
        for division, worst in each["gradients"].items():
            assert worst < 1e-6, division
        assert each["own part"] < 1e-6


def test_a_parameter_used_by_some_processes_has_its_gradient_on_all(found: Found) -> None:
    assert {each["some"]["on this process"] for each in found} == {True, False}
    for each in found:
        assert each["some"]["there"] == each["some"]["expected"]
        assert "rare.weight" in each["some"]["there"]
        assert "unused.weight" not in each["some"]["there"]
        assert each["some"]["worst"] < 1e-6


@pytest.mark.parametrize("when", ["Small", "SmallAtTheEnd"])
def test_out_of_memory_on_one_process_halves_the_micro_batch_on_all(
    found: Found, when: str
) -> None:
    for each in found:
        assert each["memory"][when]["micro_batch"] == 2
        assert each["memory"][when]["worst"] < 1e-6


def test_gradients_are_sent_during_the_backward_pass(found: Found) -> None:
    for each in found:
        *when_sent, there = each["overlap"]
        assert len(when_sent) > 1
        assert 0 < when_sent[0] < there
        assert when_sent == sorted(when_sent)


@pytest.mark.parametrize(("name", "undivided"), [("everything", True), ("own parts", False)])
def test_a_fit_in_three_processes_equals_one(found: Found, name: str, undivided: bool) -> None:
    assert {each["fits"][name]["undivided"] for each in found} == {undivided}
    # Only the main process has the best weights.
    assert all(each["fits"][name]["same weights"] for each in found) == (name == "own parts")
    main = found[0]["fits"][name]
    assert len(main["rows"]) == len(main["expected rows"]) > 6
    for row, expected in zip(main["rows"], main["expected rows"], strict=True):
        assert row.keys() == expected.keys()
        assert (row["kind"], row["step"]) == (expected["kind"], expected["step"])
        for key in row.keys() - {*SPEED, "stage", "kind"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
    assert main["metrics"].keys() == main["expected metrics"].keys()
    for key, value in main["expected metrics"].items():
        assert main["metrics"][key] == pytest.approx(value, rel=1e-5, nan_ok=True), key
    if name == "everything":
        assert main["metrics"]["val_seen"] == 30


def test_a_signal_to_one_process_stops_all_and_one_resumes(found: Found) -> None:
    assert [each["stopped"]["step"] for each in found] == [7, 7, 7]
    for each in found:
        assert each["stopped"]["said"].startswith("stopped by SIGTERM")
    expected = found[0]["fits"]["everything"]["expected metrics"]
    for key, value in found[0]["stopped"]["metrics"].items():
        assert value == pytest.approx(expected[key], rel=1e-5, nan_ok=True), key


def test_norm_statistics_are_the_same_on_all_processes(found: Found) -> None:
    assert all(each["norm"]["same"] and each["norm"]["norm"] > 0.01 for each in found)


def test_a_split_is_gathered_in_order_without_duplicates(found: Found) -> None:
    assert [each["split"] for each in found] == [{"44": True, "2": True}] * 3


def test_the_end_of_a_process_is_an_error_in_the_others(found: Found) -> None:
    for each in found[:2]:
        assert each["gone"].startswith("another process of this run has ended")


@pytest.mark.parametrize(("n", "size"), [(0, 3), (1, 3), (2, 3), (20, 3), (24, 4), (5, 1)])
def test_parts_cover_all_and_differ_by_one_at_most(n: int, size: int) -> None:
    groups = [ProcessGroup(rank, size) for rank in range(size)]
    rows = [row for each in groups for row in range(n)[each.local_slice(n)]]
    assert rows == list(range(n))
    sizes = [len(range(n)[each.local_slice(n)]) for each in groups]
    assert max(sizes) == groups[0].largest_part(n) == math.ceil(n / size)
    assert max(sizes) - min(sizes) <= 1


def test_one_process_copies_nothing() -> None:
    value = torch.ones(3)
    assert SINGLE_PROCESS.all_reduce(value) is value
    assert SINGLE_PROCESS.all_gather(value, 3) is value
    assert SINGLE_PROCESS.broadcast(value) is value
