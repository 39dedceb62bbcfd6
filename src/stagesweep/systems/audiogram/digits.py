"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, which need no download."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import View


class Digits:
    """The digits as a clustering problem: training uses all images and no label.

    `train` holds all images. `val` and `test` are two halves of them, stratified by digit and drawn
    with `seed`. The labels of `val` steer a search, those of `test` score its result. Columns:
    `image` (N, 64) in 0..1 and the label `digit`.
    """

    def __init__(self, seed: int = 0) -> None:
        digits = load_digits()
        rows, columns = digits.images.shape[1:]
        names = tuple(f"pixel_{row}_{column}" for row in range(rows) for column in range(columns))
        image = Features(names, low=0.0, high=1.0, grid=(rows, columns), unit="intensity")
        self.spec = Spec(features={"image": image}, labels={"digit": len(digits.target_names)})
        pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target, dtype=torch.int64)
        val, test = train_test_split(
            range(len(labels)), test_size=0.5, random_state=seed, stratify=digits.target
        )
        self.rows = {"train": list(range(len(labels))), "val": sorted(val), "test": sorted(test)}
        self.columns = {"image": pixels, "digit": labels}

    def split(self, name: str) -> View:
        """Return the images of a split, in the order of the data set."""
        rows = self._members(name)
        return View({key: column[rows] for key, column in self.columns.items()})

    def ids(self, split: str) -> NDArray[np.str_]:
        """Return the names (n,) of the images of a split: their row numbers in the data set."""
        return np.array(self._members(split)).astype(str)

    def _members(self, split: str) -> list[int]:
        if split not in self.rows:
            raise UserError(f"digits have no split '{split}': choose from {', '.join(self.rows)}")
        return self.rows[split]
