"""The stage that trains the experts one after the other, each on the clips of its cluster."""

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
from stagesweep.systems.speech.stage.fits import heard, measured

if TYPE_CHECKING:
    from stagesweep.run.context import Context


@dataclass
class PretrainExperts(Fit):
    """Train each expert on the training clips of its cluster, the rest of the model as it is.

    `sampler` may be a `Subset`: then the clips are of that subset. A clip that was extracted has
    the cluster that was found; others are encoded, and have the nearest. Validation clips are those
    of the cluster as well, or all of them where it has none.

    Each expert is in the store under a fingerprint of its own, which follows from its clips, its
    first weights, the base and the settings, and from nothing else. So when the clips of one
    cluster change, one expert is trained again; a run that was killed goes on within the expert
    that it was at.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return ``train_loss`` and ``val_loss``, means over experts by their clips, how many
        experts were `trained` now and how many `reused`, and the clips of the smallest.
        """
        model: Any = run.model
        views = {split: labelled(run, split, self.subset(run, split)) for split in ("train", "val")}
        plain = replace(self, sampler=None)
        base = digest_of(
            {n: v for n, v in model.state_dict().items() if not is_expert(n) and n[:5] != "gate."}
        )
        rows: list[tuple[int, dict[str, float]]] = []
        counts = {"trained": 0, "reused": 0}
        state = model.state_dict()
        for expert in range(model.experts):
            own = {split: of_expert(view, expert) for split, view in views.items()}
            if not len(own["train"]):
                run.log.warning("%s: expert %d has no clips, left as it is", run.stage, expert)
                continue
            if not len(own["val"]):
                own["val"] = views["val"].with_columns(
                    {"expert": torch.full((len(views["val"]),), expert)}
                )
            names = [name for name in state if is_expert(name) and name.endswith(f".{expert}")]
            inputs = {
                "settings": settings_of(plain),
                "base": base,
                "first": digest_of({name: state[name] for name in names}),
                "clips": {s: digest_of_clips(view) for s, view in own.items()},
                "model": str(run.cfg.model),
            }
            settings = replace(plain, train=[f"*.A.{expert}", f"*.B.{expert}"], freeze=[])
            with measured(run, model, settings):
                metrics, status = run.fit_apart(
                    model, settings, f"{run.stage}_{expert}", own, inputs, names
                )
            counts[status] += 1
            rows.append((len(own["train"]), metrics))
        run.save_weights()
        return self.summary(rows) | {name: float(count) for name, count in counts.items()}

    def subset(self, run: "Context", split: str) -> Tensor:
        """The rows of a split that experts learn from."""
        view = run.data.split(split)
        if split == "train" and isinstance(self.sampler, Subset):
            return self.sampler.rows(view)
        return torch.arange(len(view))

    def summary(self, rows: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
        """Means over experts by their clips, and the fewest clips of any."""
        weights = np.array([count for count, _ in rows], float)
        found = {}
        for name in ("train_loss", "val_loss"):
            values = np.array([metrics.get(name, np.nan) for _, metrics in rows])
            found[name] = float((values * weights).sum() / weights.sum()) if len(rows) else np.nan
        return found | {"fewest_clips": float(weights.min(initial=np.inf) if len(rows) else 0)}

    def metric_names(self, terms: Any) -> set[str] | None:
        """Metrics this stage gives."""
        known = {"train_loss", "val_loss", "trained", "reused", "fewest_clips"}
        return None if self.metrics else known


def labelled(run: "Context", split: str, rows: Tensor) -> SpeechView:
    """Some clips of a split with the column `cluster`, which is found for those that have none."""
    model: Any = run.model
    view = heard(run, split)
    table = run.load("clusters.csv")
    known = table[table["split"] == split]
    cluster = np.full(len(view), -1, np.int64)
    cluster[known["row"].to_numpy()] = known["cluster"].to_numpy()
    chosen = view.take(rows)
    codes = torch.from_numpy(cluster[rows.numpy()])
    if len(unknown := (codes < 0).nonzero()[:, 0]):
        found = Clustering.restored(run.load("clusters.npz"))
        run.log.info("%s: %d clips of %s have no cluster yet", run.stage, len(unknown), split)
        model.eval()
        pooled = []
        others = run.prepared(chosen.take(unknown))
        with torch.inference_mode():
            for batch in run.progress(others.batches(32), f"clusters of {split}"):
                batch = {
                    n: batch[n].to(run.device) for n in ("mel", "states", "frames") if n in batch
                }
                pooled.append(model.pool(model.encode(batch), batch["frames"]).float().cpu())
        codes[unknown] = torch.from_numpy(found.assign(torch.cat(pooled).numpy())[0])
    return chosen.with_columns({"cluster": codes})


def of_expert(view: SpeechView, expert: int) -> SpeechView:
    """The clips of one cluster, with the column `expert`."""
    own = view.take((view["cluster"] == expert).nonzero()[:, 0])
    return own.with_columns({"expert": torch.full((len(own),), expert)})


def settings_of(fit: schema.Fit) -> dict[str, Any]:
    """What of the settings changes the result, as plain values."""
    found: dict[str, Any] = {}
    for field in fields(fit):
        value = getattr(fit, field.name)
        if field.metadata.get("fingerprint", True) and field.name not in ("train", "freeze"):
            found[field.name] = repr(value)
    return found


def digest_of(state: dict[str, Tensor]) -> str:
    """Hash of named tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of_clips(view: SpeechView) -> str:
    """Hash of everything that a fit is given of these clips, in their order."""
    every = "".join(view.samples.digest(number) for number in range(len(view)))
    return hashlib.sha256(every.encode()).hexdigest()
