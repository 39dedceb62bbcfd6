"""Processes with a part of the model each compute the same as one process; see sharded.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stagesweep.hardware.throughput import SPEED

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(left_by: Callable[[str], Path]) -> Found:
    """Results of two, and then three, processes."""
    folder = left_by("sharded")
    return {
        size: [torch.load(folder / f"{size}_{rank}.pt", weights_only=True) for rank in range(size)]
        for size in (2, 3)
    }


def assert_same(numbers: dict[str, Any], expected: dict[str, Any]) -> None:
    """All numbers but those of the speed."""
    assert numbers.keys() == expected.keys()
    for name in numbers.keys() - {*SPEED, "stage", "kind"}:
        assert numbers[name] == pytest.approx(expected[name], rel=1e-5, nan_ok=True), name


def test_the_gradient_does_not_depend_on_the_division_of_the_batch(found: Found) -> None:
    for each in found[2]:
        assert len(each["gradients"]) == 4
        for division, worst in each["gradients"].items():
            assert worst < 1e-6, division


def test_parameters_have_the_gradients_of_one_process(found: Found) -> None:
    assert {each["some"]["on this process"] for each in found[2]} == {True, False}
    for each in found[2]:
        assert each["some"]["there"] == each["some"]["expected"]
        assert "rare.weight" in each["some"]["there"]
        assert "unused.weight" not in each["some"]["there"]


def test_a_fit_in_two_processes_equals_one(found: Found) -> None:
    main = found[2][0]["fit"]
    assert len(main["rows"]) == len(main["expected rows"]) > 6
    for row, expected in zip(main["rows"], main["expected rows"], strict=True):
        assert_same(row, expected)
    assert_same(main["metrics"], main["expected metrics"])
    for name, expected in main["expected weights"].items():
        torch.testing.assert_close(main["weights"][name], expected, rtol=1e-5, atol=1e-6)


def test_each_process_holds_its_share_of_weights_and_moments(found: Found) -> None:
    assert all(0.4 < each["fit"]["share"] < 0.6 for each in found[2])


def test_saved_weights_are_full(found: Found) -> None:
    main = found[2][0]["fit"]
    assert {"last.pt", "best_val_mean.pt"} <= set(main["files"])
    shapes, expected = (
        {name: value.shape for name, value in main[key].items()} for key in ("last", "weights")
    )
    assert shapes == expected


def test_out_of_memory_ends_the_run_with_the_remedy(found: Found) -> None:
    for each in found[2]:
        assert each["full"] == (
            "too little memory for 4 samples at a time (training), and with "
            "hardware.parallel=shard a step cannot be repeated in smaller parts: set "
            "hardware.micro_batch=2"
        )


def test_one_process_resumes_from_a_checkpoint_of_two(found: Found) -> None:
    main = found[2][0]
    assert main["kept"] == ["best_val_mean.pt", "step_000000005", "step_000000007"]
    assert_same(main["one"], main["fit"]["expected metrics"])


@pytest.mark.parametrize("name", ["of two", "of one", "damaged"])
def test_three_processes_resume_from_a_checkpoint_of(found: Found, name: str) -> None:
    expected = found[2][0]["fit"]["expected metrics"]
    assert_same(found[3][0][name]["metrics"], expected)
    # The checkpoint of step 7 is the one that is damaged.
    assert {each[name]["from"] for each in found[3]} == {5 if name == "damaged" else 7}


def test_unfinished_checkpoints_are_removed(found: Found) -> None:
    kept = found[3][0]["kept"]
    assert [name for name in kept if name.startswith((".", "step"))] == [
        "step_000000010",
        "step_000000015",
    ]
