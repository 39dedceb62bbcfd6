import pytest

from stagesweep.hardware import micro_batch_search


@pytest.mark.parametrize("limit", [1, 2, 7, 8, 9, 100, 513])
@pytest.mark.parametrize("room", [0, 1, 3, 8, 15, 16, 60, 99, 10_000])
def test_the_largest_size_that_fits_is_found_in_few_steps(room: int, limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= room

    found = micro_batch_search.largest(fits, limit)
    best = min(room, limit)
    assert best - best // 16 <= found <= best
    assert max(tried) <= limit
    assert len(tried) == len(set(tried)) <= 13
