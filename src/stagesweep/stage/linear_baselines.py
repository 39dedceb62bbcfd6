"""Linear baselines for the folds of a cross-validation."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

Array = NDArray[Any]
Columns = Mapping[str, Array]


@dataclass
class Ridge:
    """Ridge regression of the proportions in column `target` (n, k) on z-scores of `column`.

    The penalty is chosen by leave-one-out error. Predictions are clipped at 0 and normalised to 1.
    """

    column: str
    target: str

    def __call__(self, train: Columns, test: Columns) -> dict[str, Array]:
        """Return the predictions (n, k) for the test samples, named as the target."""
        with threadpool_limits(limits=1):
            model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 6, 17)))
            model.fit(train[self.column], train[self.target])
            predicted = np.maximum(model.predict(test[self.column]), 0)
        return {self.target: predicted / np.maximum(predicted.sum(1, keepdims=True), 1e-12)}


@dataclass
class Logistic:
    """Logistic regression of `label` on z-scores of `column`, whose rows may have any shape.

    `penalty` is the inverse of scikit-learn's C.
    """

    column: str
    label: str
    penalty: float = 1.0

    def __call__(self, train: Columns, test: Columns) -> dict[str, Array]:
        """Return probabilities (n, k) of the labels as ``assignment``."""
        known = train[self.label] >= 0
        rows, others = (c[self.column].reshape(len(c[self.column]), -1) for c in (train, test))
        kinds = int(max(c[self.label].max() for c in (train, test))) + 1
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=1 / self.penalty, max_iter=1000)
        )
        with threadpool_limits(limits=1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(rows[known], train[self.label][known])
            shares = np.zeros((len(others), kinds))
            shares[:, model[-1].classes_] = model.predict_proba(others)
        return {"assignment": shares}
