import torch

from stagesweep.systems.singlecell.normalise import log_normalise


def test_log_normalisation_is_per_ten_thousand_counts() -> None:
    counts = torch.randint(0, 9, (7, 12), generator=torch.Generator().manual_seed(1)).float()
    library = counts.sum(1, keepdim=True)
    expected = counts / library * 10_000
    torch.testing.assert_close(
        log_normalise(counts, library).expm1(), expected, rtol=1e-4, atol=1e-2
    )
