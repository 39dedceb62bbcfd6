"""The stage that decodes held-out clips and scores what was heard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd

from stagesweep.base.errors import UserError
from stagesweep.base.files import atomic_text, atomic_write
from stagesweep.systems.speech import metric
from stagesweep.systems.speech.optional import optional_imports
from stagesweep.systems.speech.transcribe import transcribe

if TYPE_CHECKING:
    from stagesweep.run.context import Context

BASELINES = ("baselines.csv", "transcript_baseline.csv")


@dataclass
class Transcribe:
    """Decode `splits` with each clip's likeliest expert, greedily or by a search of `beams`.

    Leaves ``wer.csv``: error rates of the model (`routed`) and of the baselines that earlier stages
    left, for each split and stratum, with 95 % intervals over speakers (`resamples` of a
    bootstrap); ``hypotheses.csv``, what was heard in each clip; ``expert_use.csv``, how experts are
    used in each stratum. With `adapters` each expert is written in peft's format as well, one
    folder each: ``adapters/expert_<e>``.
    """

    splits: Sequence[str] = ("val", "test")
    beams: int = 1
    batch_size: int = 64
    resamples: int = 1000
    adapters: bool = False

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return ``<split>_wer`` and ``_cer`` of the model, those of each stratum
        (``<split>_wer_<stratum>``) and method (``<split>_<method>_wer``), ``<split>_routing_ari``,
        ``_expert_use_<e>``, ``_least_use`` and ``_entropy``.
        """
        if self.beams < 1 or self.batch_size < 1 or not self.splits:
            raise UserError(
                f"stage.{run.stage}: beams and batch_size must be at least 1, and splits name one"
            )
        model: Any = run.model
        told, uses = [], []
        numbers: dict[str, float] = {}
        for split in self.splits:
            found, probabilities = transcribe(run, model, split, self.beams, self.batch_size)
            told.append(found.assign(method="routed"))
            expert, stratum = found["expert"].to_numpy(), found["stratum"].to_numpy(str)
            own = metric.expert_usage(probabilities, expert, stratum)
            uses.append(own.assign(split=split))
            numbers |= use_numbers(split, own, model.gate.active.cpu().numpy())
            numbers[f"{split}_routing_ari"] = metric.agreement(expert, stratum)
        for name in BASELINES:
            if run.has(name):
                others = run.load(name)
                told.append(others[others["split"].isin(self.splits)])
        every = pd.concat(told, ignore_index=True)
        every = every.fillna({"hypothesis": "", "reference": ""})
        run.save("hypotheses.csv", every)
        run.save("expert_use.csv", pd.concat(uses, ignore_index=True))
        table = metric.table(every, run.seed % 2**31, self.resamples)
        run.save("wer.csv", table)
        if self.adapters:
            write_adapters(run, model)
        return numbers | rate_numbers(table)

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives: some are named after strata, which are not known before."""
        return None


def use_numbers(split: str, use: pd.DataFrame, active: Any) -> dict[str, float]:
    """How experts are used, as metrics; `active` (E,) are those that may be."""
    whole = use.set_index("stratum").loc["all"]
    shares = np.array([whole[f"expert_{number}"] for number in range(len(active))])
    found = {f"{split}_expert_use_{n}": float(share) for n, share in enumerate(shares)}
    found[f"{split}_least_use"] = float(shares[active].min())
    found[f"{split}_entropy"] = float(whole["entropy"])
    strata = use[use["stratum"] != "all"]
    if len(strata) > 1:
        for row in strata.to_dict("records"):
            found[f"{split}_entropy_{row['stratum']}"] = float(row["entropy"])
    return found


def rate_numbers(table: pd.DataFrame) -> dict[str, float]:
    """Error rates, as metrics: with intervals those of the model over all strata."""
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
    """Each expert as peft keeps an adapter of its rank."""
    with optional_imports():
        from safetensors.torch import save
    config = {
        "peft_type": "LORA",
        "task_type": None,  # with one, peft takes the input to be text
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
        atomic_write(path, partial(_put, save(tensors)))
        atomic_text(run.file(f"{folder}/adapter_config.json"), json.dumps(config, indent=1))


def _put(content: bytes, stream: BinaryIO) -> None:
    stream.write(content)
