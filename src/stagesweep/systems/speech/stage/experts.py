"""Stage that trains the experts one after the other, each on the clips of its cluster."""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stagesweep.config import schema
from stagesweep.stage.fit import Fit
from stagesweep.systems.speech.data.sampler import Subset
from stagesweep.systems.speech.data.windows import SpeechView
from stagesweep.systems.speech.model.mixture import is_expert
from stagesweep.systems.speech.stage.cluster import Clustering
from stagesweep.systems.speech.stage.fits import error_rates_enabled, split_view

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class PretrainExperts(Fit):
    """Train each expert on the training clips of its cluster; other parameters are frozen.

    A `Subset` as `sampler` restricts the clips. Clips that were not extracted are encoded and
    assigned to the nearest cluster. Validation clips are those of the cluster, or all if it has
    none.

    Each expert has its own fingerprint in the store: its clips, its initial weights, the base and
    the settings. So if the clips of one cluster change, only that expert is trained again, and a
    killed run resumes within the current expert.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return ``train_loss`` and ``val_loss``, means over experts weighted by clips; the numbers
        of experts `trained` and `reused`; and ``fewest_clips`` of an expert.
        """
        model: Any = run.model
        views = {
            split: view_with_clusters(run, split, self.subset(run, split))
            for split in ("train", "val")
        }
        plain = replace(self, sampler=None)
        base = tensor_digest(
            {n: v for n, v in model.state_dict().items() if not is_expert(n) and n[:5] != "gate."}
        )
        rows: list[tuple[int, dict[str, float]]] = []
        counts = {"trained": 0, "reused": 0}
        state = model.state_dict()
        for expert in range(model.experts):
            own = {split: expert_view(view, expert) for split, view in views.items()}
            if not len(own["train"]):
                run.log.warning("%s: expert %d has no clips and is not trained", run.stage, expert)
                continue
            if not len(own["val"]):
                own["val"] = views["val"].with_columns(
                    {"expert": torch.full((len(views["val"]),), expert)}
                )
            names = [name for name in state if is_expert(name) and name.endswith(f".{expert}")]
            inputs = {
                "settings": result_settings(plain),
                "base": base,
                "first": tensor_digest({name: state[name] for name in names}),
                "clips": {s: clips_digest(view) for s, view in own.items()},
                "model": str(run.cfg.model),
            }
            settings = replace(plain, train=[f"*.A.{expert}", f"*.B.{expert}"], freeze=[])
            with error_rates_enabled(run, model, settings):
                metrics, status = run.fit_apart(
                    model, settings, f"{run.stage}_{expert}", own, inputs, names
                )
            counts[status] += 1
            rows.append((len(own["train"]), metrics))
        run.save_weights()
        return self.summary(rows) | {name: float(count) for name, count in counts.items()}

    def subset(self, run: "Context", split: str) -> Tensor:
        """Return the rows of a split that the experts use."""
        view = run.data.split(split)
        if split == "train" and isinstance(self.sampler, Subset):
            return self.sampler.rows(view)
        return torch.arange(len(view))

    def summary(self, rows: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
        """Return mean losses weighted by clips, and the fewest clips of an expert."""
        weights = np.array([count for count, _ in rows], float)
        found = {}
        for name in ("train_loss", "val_loss"):
            values = np.array([metrics.get(name, np.nan) for _, metrics in rows])
            found[name] = float((values * weights).sum() / weights.sum()) if len(rows) else np.nan
        return found | {"fewest_clips": float(weights.min(initial=np.inf) if len(rows) else 0)}

    def metric_names(self, terms: Any) -> set[str] | None:
        """Names of the metrics of this stage."""
        known = {"train_loss", "val_loss", "trained", "reused", "fewest_clips"}
        return None if self.metrics else known


def view_with_clusters(run: "Context", split: str, rows: Tensor) -> SpeechView:
    """Return clips of a split with the column `cluster`, assigned where it is missing."""
    model: Any = run.model
    view = split_view(run, split)
    table = run.load("clusters.csv")
    known = table[table["split"] == split]
    cluster = np.full(len(view), -1, np.int64)
    cluster[known["row"].to_numpy()] = known["cluster"].to_numpy()
    chosen = view.take(rows)
    codes = torch.from_numpy(cluster[rows.numpy()])
    if len(unknown := (codes < 0).nonzero()[:, 0]):
        found = Clustering.from_arrays(run.load("clusters.npz"))
        run.log.info("%s: assigning clusters to %d clips of %s", run.stage, len(unknown), split)
        model.eval()
        pooled = []
        missing = run.prepared(chosen.take(unknown))
        with torch.inference_mode():
            for batch in run.progress(missing.batches(32), f"clusters of {split}"):
                batch = {
                    n: batch[n].to(run.device) for n in ("mel", "states", "frames") if n in batch
                }
                pooled.append(model.pool(model.encode(batch), batch["frames"]).float().cpu())
        codes[unknown] = torch.from_numpy(found.assign(torch.cat(pooled).numpy())[0])
    return chosen.with_columns({"cluster": codes})


def expert_view(view: SpeechView, expert: int) -> SpeechView:
    """Return the clips of one cluster, with the column `expert`."""
    own = view.take((view["cluster"] == expert).nonzero()[:, 0])
    return own.with_columns({"expert": torch.full((len(own),), expert)})


def result_settings(fit: schema.Fit) -> dict[str, Any]:
    """Return the settings that affect the result, as text."""
    found: dict[str, Any] = {}
    for field in fields(fit):
        value = getattr(fit, field.name)
        if field.metadata.get("fingerprint", True) and field.name not in ("train", "freeze"):
            found[field.name] = repr(value)
    return found


def tensor_digest(state: dict[str, Tensor]) -> str:
    """Hash of named tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def clips_digest(view: SpeechView) -> str:
    """Hash of the samples of a view, in order."""
    digests = "".join(view.samples.digest(number) for number in range(len(view)))
    return hashlib.sha256(digests.encode()).hexdigest()
