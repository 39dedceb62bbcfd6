"""The stages of what the mixture is compared with, for the same table."""

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

from stagesweep.stage.fit import Fit
from stagesweep.systems.speech.model.mixture import Mixture, is_expert
from stagesweep.systems.speech.stage.experts import digest_of, digest_of_clips, settings_of
from stagesweep.systems.speech.stage.fits import heard, measured
from stagesweep.systems.speech.transcribe import transcribe

if TYPE_CHECKING:
    from stagesweep.run.context import Context

Array = NDArray[Any]
TRAINED: tuple[Mixture, ...] = ("shared", "dense")
SPLITS = ("val", "test")


@dataclass
class AdapterBaselines(Fit):
    """Train one shared adapter of the experts' total rank, and a dense mixture of all experts.

    Both begin from the base as the experts do, and should have as many epochs as experts and joint
    training together. The dense mixture weighs all experts within each layer by the gate, which
    begins untrained. Each is in the store by itself, as experts are.

    Leaves ``baselines.csv``: what `shared`, `dense` and `none` (the base alone) hear in the clips
    of val and test.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the losses of each: ``<method>_train_loss`` and ``<method>_val_loss``."""
        found: list[pd.DataFrame] = []
        metrics: dict[str, float] = {}
        views = {split: heard(run, split) for split in ("train", "val")}
        clips = {split: digest_of_clips(view) for split, view in views.items()}
        base = {n: v for n, v in run.model.state_dict().items() if not is_adapter(n)}
        model: Any = run.build_model()
        first = model.state_dict()
        names = [name for name in first if is_adapter(name) and name != "gate.active"]
        for method in TRAINED:
            model.load_state_dict(first | base, strict=False)
            inputs = {
                "method": method,
                "settings": settings_of(self),
                "base": digest_of(base),
                "first": digest_of({name: first[name] for name in names}),
                "clips": clips,
                "model": str(run.cfg.model),
            }
            settings = replace(self, train=["gate.*", "*.A.*", "*.B.*"], freeze=[])
            with model.mixed(method), measured(run, model, settings):
                own, _ = run.fit_apart(
                    model, settings, f"{run.stage}_{method}", views, inputs, names
                )
            with model.mixed(method):
                found += self.told(run, model, method)
            metrics |= {f"{method}_{n}": own[n] for n in ("train_loss", "val_loss") if n in own}
        with model.mixed("none"):
            found += self.told(run, model, "none")
        run.save("baselines.csv", pd.concat(found, ignore_index=True))
        return metrics

    def told(self, run: "Context", model: Any, method: str) -> list[pd.DataFrame]:
        """What a model hears in the clips of val and test."""
        return [transcribe(run, model, split)[0].assign(method=method) for split in SPLITS]

    def metric_names(self, terms: Any) -> set[str] | None:
        """Metrics this stage gives."""
        return {f"{method}_{name}_loss" for method in TRAINED for name in ("train", "val")}


def is_adapter(name: str) -> bool:
    """Whether a tensor of a model belongs to its experts or its gate."""
    return is_expert(name) or name.startswith("gate.")


@dataclass
class TranscriptBaseline:
    """Logistic regression from a clip's mean log-mel features, in `segments` equal parts of its
    time, to its whole transcript: a floor for data of few different transcripts.

    Leaves ``transcript_baseline.csv``, as `AdapterBaselines` does.
    """

    segments: int = 1
    C: float = 1.0

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the share of validation clips whose transcript it tells."""
        train, texts = self.read(run, "train")
        model = make_pipeline(StandardScaler(), LogisticRegression(C=self.C, max_iter=2000))
        found = []
        with threadpool_limits(limits=1):
            model.fit(train, texts)
            for split in SPLITS:
                values, said = self.read(run, split)
                view = run.data.split(split)
                clips = run.data.clips.iloc[view["clip"].numpy()]
                named = {n: clips[n].to_numpy(str) for n in ("id", "speaker", "stratum")}
                told = {"reference": said, "hypothesis": model.predict(values)}
                found.append(pd.DataFrame({"split": split, **named, **told, "method": "logistic"}))
        table = pd.concat(found, ignore_index=True)
        run.save("transcript_baseline.csv", table)
        val = table[table["split"] == "val"]
        return {"val_accuracy": float((val["reference"] == val["hypothesis"]).mean())}

    def read(self, run: "Context", split: str) -> tuple[Array, Sequence[str]]:
        """Mean features (n, segments x bands) and transcripts of a split."""
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
        """Metrics this stage gives."""
        return {"val_accuracy"}
