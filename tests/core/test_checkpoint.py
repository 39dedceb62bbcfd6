import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagesweep.base.errors import UserError
from stagesweep.core.checkpoint import load, load_newest, save, save_numbered


def state(value: float, size: int = 4) -> dict[str, Any]:
    return {
        "model": {"weight": torch.full((size,), value), "mask": torch.tensor([True, False])},
        "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "fused": True}]},
        "trackers": {"best/val_loss": [None, 3]},
        "loop": {"epoch": 3, "finished": False, "row": {"val_loss": float("nan")}},
    }


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def value(found: dict[str, Any] | None) -> float:
    assert found is not None
    number: float = found["model"]["weight"][0].item()
    return number


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        save(tmp_path / "a.pt", state(2.5))
        found = load(tmp_path / "a.pt")
        assert str(found) == str(state(2.5))
        assert isinstance(found["optimizer"]["param_groups"][0]["betas"], tuple)
        assert files(tmp_path) == ["a.pt"]

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as caught:
            load(tmp_path / "a.pt")
        assert str(caught.value) == f"no checkpoint at {tmp_path / 'a.pt'}"

    @pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
    def test_truncated(self, tmp_path: Path, part: float) -> None:
        path = tmp_path / "a.pt"
        save(path, state(1.0, size=1000))
        os.truncate(path, int(path.stat().st_size * part))
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value).startswith(
            f"cannot read checkpoint {path}: truncated or foreign ("
        )
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content",
        [
            b"a text file\n",
            b"\x80\x04",
            pickle.dumps({"model": {}}),
            pickle.dumps(Path("x")),
            b"PK\x03\x04 not a zip",
        ],
    )
    def test_foreign(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.pt"
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value).startswith(f"cannot read checkpoint {path}: ")
        assert "truncated or foreign (" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [{"weights": {}}, [1, 2], torch.zeros(3), {"model": 3}])
    def test_without_weights(self, tmp_path: Path, content: Any) -> None:
        path = tmp_path / "a.pt"
        torch.save(content, path)
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value) == (
            f"cannot read checkpoint {path}: foreign (it holds no 'model' weights)"
        )

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, tuple[str]]:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        torch.save({"model": Evil()}, tmp_path / "a.pt")
        with pytest.raises(UserError, match="truncated or foreign"):
            load(tmp_path / "a.pt")
        assert files(tmp_path) == ["a.pt"]

    @settings(
        deadline=None,
        max_examples=25,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(st.binary(max_size=200), st.floats(0, 1))
    def test_a_damaged_checkpoint_is_one_line(self, tmp_path: Path, junk: bytes, at: float) -> None:
        path = tmp_path / "a.pt"
        save(path, state(1.0))
        content = bytearray(path.read_bytes())
        start = int(at * len(content))
        content[start : start + len(junk)] = junk
        path.write_bytes(content)
        try:
            load(path)  # damage to padding, names or numbers may go unseen
        except UserError as error:
            assert str(error).startswith(f"cannot read checkpoint {path}: ")  # noqa: PT017


class TestFolder:
    def fill(self, folder: Path, *steps: int, keep: int = 9) -> None:
        for step in steps:
            save_numbered(folder, step, state(step), keep)

    def test_no_folder_and_no_checkpoint(self, tmp_path: Path) -> None:
        assert load_newest(tmp_path) is None
        assert load_newest(tmp_path / "none") is None

    def test_the_newest_is_read(self, tmp_path: Path) -> None:
        self.fill(tmp_path, 2, 10, 100)
        assert value(load_newest(tmp_path)) == 100
        assert value(load(tmp_path / "last.pt")) == 100

    @pytest.mark.parametrize("keep", [1, 2, 3, 9])
    def test_only_the_newest_checkpoints_are_kept(self, tmp_path: Path, keep: int) -> None:
        self.fill(tmp_path, *range(10, 60, 10), keep=keep)
        kept = [f"step_{n:09d}.pt" for n in range(10, 60, 10)][-keep:]
        assert files(tmp_path) == ["last.pt", *kept]

    def test_other_checkpoints_are_not_removed(self, tmp_path: Path) -> None:
        save(tmp_path / "best_val_loss.pt", state(0))
        self.fill(tmp_path, 1, 2, keep=1)
        assert files(tmp_path) == ["best_val_loss.pt", "last.pt", "step_000000002.pt"]

    def test_a_broken_checkpoint_is_named_and_the_previous_one_is_read(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.fill(tmp_path, 1, 2, 3)
        for step in (2, 3):
            truncate(tmp_path / f"step_00000000{step}.pt")
        with caplog.at_level(logging.WARNING):
            assert value(load_newest(tmp_path)) == 1
        said = [record.message for record in caplog.records]
        newest = tmp_path / "step_000000003.pt"
        assert said[0].startswith(f"cannot read checkpoint {newest}: truncated or foreign (")
        assert said[0].endswith("; falling back to step_000000002.pt")
        assert said[1].endswith("; falling back to step_000000001.pt")
        assert len(said) == 2

    def test_a_broken_checkpoint_is_removed_by_the_next_save(self, tmp_path: Path) -> None:
        self.fill(tmp_path, 10, 20, 30)
        truncate(tmp_path / "step_000000030.pt")
        self.fill(tmp_path, 25, keep=2)
        assert files(tmp_path) == ["last.pt", "step_000000020.pt", "step_000000025.pt"]
        assert value(load_newest(tmp_path)) == 25

    def test_an_error_names_the_oldest_if_none_can_be_read(self, tmp_path: Path) -> None:
        self.fill(tmp_path, 1, 2)
        for path in tmp_path.iterdir():
            path.write_text("text")
        with pytest.raises(UserError) as caught:
            load_newest(tmp_path)
        oldest = tmp_path / "step_000000001.pt"
        assert str(caught.value).startswith(f"cannot read checkpoint {oldest}: truncated or ")
        assert str(caught.value).endswith("; no older one to fall back to: set resume=never")


class TestFullDisk:
    def test_a_failed_save_keeps_the_old_checkpoint(self, small_disk: Path) -> None:
        save_numbered(small_disk, 1, state(1, size=80_000), keep=2)
        with pytest.raises(UserError) as caught:
            save_numbered(small_disk, 2, state(2, size=240_000), keep=2)
        said = str(caught.value)
        newest = small_disk / "step_000000002.pt"
        assert said.startswith(f"disk full: cannot write {newest} (")
        assert "\n" not in said
        assert files(small_disk) == ["last.pt", "step_000000001.pt"]
        assert value(load_newest(small_disk)) == 1
        assert value(load(small_disk / "last.pt")) == 1
