"""Baseline stages, compared with the mixture in the same table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from stagesweep.config.schema import bounded
from stagesweep.stage.fit import Fit
from stagesweep.systems.speech.model.mixture import Mixture, is_expert
from stagesweep.systems.speech.stage.decoding import transcribe
from stagesweep.systems.speech.stage.experts import clips_digest, result_settings, tensor_digest
from stagesweep.systems.speech.stage.fits import error_rates_enabled, split_view

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
TRAINED: tuple[Mixture, ...] = ("shared", "dense")
SPLITS = ("val", "test")


@dataclass
class AdapterBaselines(Fit):
    """Train one shared adapter with the total rank of the experts, and a dense mixture of experts.

    Both start from the base model, as the experts do. For a fair comparison they need as many
    epochs as experts and joint training together. The dense mixture weights all experts in each
    layer by the gate, which starts untrained. Each baseline has its own fingerprint in the store.

    Saves ``baselines.csv``: transcripts of val and test by `shared`, `dense` and `none` (the base
    model alone).
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the losses of each method: ``<method>_train_loss`` and ``<method>_val_loss``."""
        found: list[pd.DataFrame] = []
        metrics: dict[str, float] = {}
        views = {split: split_view(run, split) for split in ("train", "val")}
        clips = {split: clips_digest(view) for split, view in views.items()}
        base = {n: v for n, v in run.model.state_dict().items() if not is_adapter(n)}
        model: Any = run.build_model()
        first = model.state_dict()
        names = [name for name in first if is_adapter(name) and name != "gate.active"]
        for method in TRAINED:
            model.load_state_dict(first | base, strict=False)
            inputs = {
                "method": method,
                "settings": result_settings(self),
                "base": tensor_digest(base),
                "first": tensor_digest({name: first[name] for name in names}),
                "clips": clips,
                "model": str(run.cfg.model),
            }
            settings = replace(self, train=["gate.*", "*.A.*", "*.B.*"], freeze=[])
            with model.mixed(method), error_rates_enabled(run, model, settings):
                own, _ = run.fit_apart(
                    model, settings, f"{run.stage}_{method}", views, inputs, names
                )
            with model.mixed(method):
                found += self.transcripts(run, model, method)
            metrics |= {f"{method}_{n}": own[n] for n in ("train_loss", "val_loss") if n in own}
        with model.mixed("none"):
            found += self.transcripts(run, model, "none")
        run.save("baselines.csv", pd.concat(found, ignore_index=True))
        return metrics

    def transcripts(self, run: "Context", model: Any, method: str) -> list[pd.DataFrame]:
        """Transcripts of val and test by a model."""
        return [transcribe(run, model, split)[0].assign(method=method) for split in SPLITS]

    def metric_names(self, terms: Any) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {f"{method}_{name}_loss" for method in TRAINED for name in ("train", "val")}


def is_adapter(name: str) -> bool:
    """Whether a name is that of a tensor of the experts or the gate."""
    return is_expert(name) or name.startswith("gate.")


@dataclass
class TranscriptBaseline:
    """Logistic regression from mean log-mel features to whole transcripts, for data with few
    different transcripts. A clip has one mean for each of `segments` equal parts of its length.

    Saves ``transcript_baseline.csv``, with the columns of ``baselines.csv``.
    """

    segments: int = bounded(1, ge=1)
    C: float = bounded(1.0, gt=0)

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the share of validation clips with the correct transcript."""
        train, texts = self.read(run, "train")
        model = make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=2000))
        found = []
        with threadpool_limits(limits=1):
            model.fit(train, texts)
            for split in SPLITS:
                values, references = self.read(run, split)
                view = run.data.split(split)
                clips = run.data.clips.iloc[view["clip"].numpy()]
                named = {n: clips[n].to_numpy(str) for n in ("id", "speaker", "stratum")}
                results = {"reference": references, "hypothesis": model.predict(values)}
                found.append(
                    pd.DataFrame({"split": split, **named, **results, "method": "logistic"})
                )
        table = pd.concat(found, ignore_index=True)
        run.save("transcript_baseline.csv", table)
        val = table[table["split"] == "val"]
        return {"val_accuracy": float((val["reference"] == val["hypothesis"]).mean())}

    def read(self, run: "Context", split: str) -> tuple[Array, Sequence[str]]:
        """Return mean features (n, segments x bands) and transcripts of a split."""
        parts: list[Array] = []
        view = run.prepared(run.data.split(split))
        for batch in view.batches(256):
            mel, frames = batch["mel"], batch["frames"]
            place = torch.arange(mel.shape[2]) * self.segments // frames[:, None]
            means = [
                torch.einsum("bmf,bf->bm", mel, own) / own.sum(1, keepdim=True).clamp(min=1)
                for number in range(self.segments)
                if (own := ((place == number) & (place < self.segments)).float()) is not None
            ]
            parts.append(torch.cat(means, 1).numpy())
        texts = run.data.clips["reference"].to_numpy(str)[view["clip"].numpy()]
        return np.concatenate(parts), texts

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {"val_accuracy"}
