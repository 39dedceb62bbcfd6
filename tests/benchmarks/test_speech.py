"""The benchmark of the mixture of experts runs."""

import pytest


def test_a_smoke_run_compares_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.speech import main

    main(["routed", "--small"])
    printed = capsys.readouterr().out
    assert "all 8 experts" in printed
    assert "2 of 8 experts" in printed
