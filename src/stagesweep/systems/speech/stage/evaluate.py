"""Stage that decodes held-out clips and scores the transcripts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, atomic_write
from stagesweep.config.schema import bounded
from stagesweep.systems.speech import metric
from stagesweep.systems.speech.optional import optional_imports
from stagesweep.systems.speech.stage.decoding import transcribe

if TYPE_CHECKING:
    from stagesweep.run.context import Context

BASELINES = ("baselines.csv", "transcript_baseline.csv")


@dataclass
class Transcribe:
    """Decode each clip of `splits` by its most probable expert: greedily, or by a beam search.

    Saves ``wer.csv``: error rates of the model (`routed`) and of the baselines of earlier stages,
    for each split and stratum, with 95 % bootstrap intervals over speakers (`resamples`);
    ``hypotheses.csv``: the transcript of each clip; ``expert_use.csv``: the usage of experts in
    each stratum. `adapters` also saves each expert in the format of peft, in the folder
    ``adapters/expert_<e>``.
    """

    splits: Sequence[str] = ("val", "test")
    beams: int = bounded(1, ge=1)
    batch_size: int = bounded(64, ge=1)
    resamples: int = bounded(1000, ge=1)
    adapters: bool = False

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return ``<split>_wer`` and ``_cer`` of the model, of each stratum
        (``<split>_wer_<stratum>``) and method (``<split>_<method>_wer``), ``<split>_routing_ari``,
        ``_expert_use_<e>``, ``_least_use`` and ``_entropy``.
        """
        if not self.splits:
            raise UserError(f"stage.{run.stage}.splits is empty; name at least one split")
        model: Any = run.model
        transcripts, usages = [], []
        metrics: dict[str, float] = {}
        for split in self.splits:
            found, probabilities = transcribe(run, model, split, self.beams, self.batch_size)
            transcripts.append(found.assign(method="routed"))
            expert, stratum = found["expert"].to_numpy(), found["stratum"].to_numpy(str)
            own = metric.expert_usage(probabilities, expert, stratum)
            usages.append(own.assign(split=split))
            metrics |= usage_metrics(split, own, model.gate.active.cpu().numpy())
            metrics[f"{split}_routing_ari"] = metric.agreement(expert, stratum)
        for name in BASELINES:
            if run.has(name):
                others = run.load(name)
                transcripts.append(others[others["split"].isin(self.splits)])
        table = pd.concat(transcripts, ignore_index=True)
        table = table.fillna({"hypothesis": "", "reference": ""})
        run.save("hypotheses.csv", table)
        run.save("expert_use.csv", pd.concat(usages, ignore_index=True))
        rates = metric.table(table, run.seed % 2**31, self.resamples)
        run.save("wer.csv", rates)
        if self.adapters:
            write_adapters(run, model)
        return metrics | rate_metrics(rates)

    def metric_names(self) -> set[str] | None:
        """None: the names of some metrics depend on the strata of the data."""
        return None


def usage_metrics(split: str, usage: pd.DataFrame, active: Any) -> dict[str, float]:
    """Return the usage of experts as metrics; `active` (E,) excludes unused experts."""
    overall = usage.set_index("stratum").loc["all"]
    shares = np.array([overall[f"expert_{number}"] for number in range(len(active))])
    found = {f"{split}_expert_use_{n}": float(share) for n, share in enumerate(shares)}
    found[f"{split}_least_use"] = float(shares[active].min())
    found[f"{split}_entropy"] = float(overall["entropy"])
    strata = usage[usage["stratum"] != "all"]
    if len(strata) > 1:
        for row in strata.to_dict("records"):
            found[f"{split}_entropy_{row['stratum']}"] = float(row["entropy"])
    return found


def rate_metrics(table: pd.DataFrame) -> dict[str, float]:
    """Return error rates as metrics, with intervals for all strata together."""
    found: dict[str, float] = {}
    for row in table.to_dict("records"):
        method = "" if row["method"] == "routed" else f"{row['method']}_"
        stratum = "" if row["stratum"] == "all" else f"_{row['stratum']}"
        for name in ("wer", "cer"):
            key = f"{row['split']}_{method}{name}{stratum}"
            found[key] = row[name]
            if not stratum:
                found |= {f"{key}_{end}": row[f"{name}_{end}"] for end in ("low", "high")}
    return found


def write_adapters(run: "Context", model: Any) -> None:
    """Save each expert as an adapter of peft."""
    with optional_imports():
        from safetensors.torch import save
    config = {
        "peft_type": "LORA",
        "task_type": None,  # with a task, peft expects text as input
        "r": model.rank,
        "lora_alpha": model.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": r"model\.decoder\..*\.(q_proj|v_proj)",
        "base_model_name_or_path": str(run.cfg.model.get("path")),
    }
    for expert in range(model.experts):
        folder = f"adapters/expert_{expert}"
        tensors = {n: v.cpu().contiguous() for n, v in model.adapter(expert).items()}
        path = run.file(f"{folder}/adapter_model.safetensors")
        atomic_write(path, partial(_write, save(tensors)))
        atomic_text(run.file(f"{folder}/adapter_config.json"), json.dumps(config, indent=1))


def _write(content: bytes, stream: BinaryIO) -> None:
    stream.write(content)
