"""Stage that trains the gate to predict clusters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stagesweep.base.view import View
from stagesweep.stage.fit import Fit

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class PretrainGate(Fit):
    """Train the gate to predict the clusters of extracted vectors.

    A batch has `pooled` (B, width), `cluster` (B,), `soft` (B, E), `speaker` and `stratum`.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the metrics of the fit, and the accuracy of the gate: `train_accuracy` and
        `val_accuracy`.
        """
        model: Any = run.model
        views = self.views(run)
        metrics = run.fit(model, self, run.stage, views)
        run.save_weights()
        model.eval()
        for split, view in views.items():
            with torch.inference_mode():
                predicted = torch.cat(
                    [model(batch)["gate"].argmax(1) for batch in run.prepared(view).batches(4096)]
                )
            correct = predicted.cpu() == view["cluster"].cpu()
            metrics[f"{split}_accuracy"] = float(correct.float().mean())
        return metrics

    def metric_names(self, terms: Mapping[str, Any]) -> set[str] | None:
        """Names of the metrics of this stage."""
        known = super().metric_names(terms)
        return None if known is None else known | {"train_accuracy", "val_accuracy"}

    def views(self, run: "Context") -> dict[str, View]:
        """Return the vectors of each split, in memory."""
        vectors = np.load(run.find("pooled.npy"))
        table, soft = run.load("clusters.csv"), run.load("clusters.npz")["soft"]
        codes = {
            name: np.array([run.data.label_names[name].index(str(v)) for v in table[name]])
            for name in ("speaker", "stratum")
        }
        columns = {"pooled": vectors, "cluster": table["cluster"].to_numpy(), "soft": soft, **codes}
        views = {}
        for split in ("train", "val"):
            own = (table["split"] == split).to_numpy()
            views[split] = View({n: torch.from_numpy(c[own]) for n, c in columns.items()})
        return views
