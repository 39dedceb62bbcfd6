"""Word and character error rates with intervals over speakers, and usage of experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from stagesweep.systems.speech.optional import optional_imports

Array = NDArray[Any]


def errors(references: Sequence[str], hypotheses: Sequence[str]) -> pd.DataFrame:
    """Return `word_errors`, `words`, `character_errors` and `characters` of each clip.

    Errors are substitutions, insertions and deletions in the alignment of jiwer.
    """
    with optional_imports():
        import jiwer
    rows = []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        words = jiwer.process_words(reference, hypothesis)
        characters = jiwer.process_characters(reference, hypothesis)
        row: dict[str, int] = {}
        for name, found in (("word", words), ("character", characters)):
            wrong = found.substitutions + found.insertions + found.deletions
            whole = found.hits + found.substitutions + found.deletions
            row |= {f"{name}_errors": wrong, f"{name}s": whole}
        rows.append(row)
    return pd.DataFrame(rows)


def rates(
    counts: pd.DataFrame, speaker: Array, seed: int, resamples: int = 1000
) -> dict[str, float]:
    """Return error rates of a corpus: errors per word (`wer`) and per character (`cer`).

    `_low` and `_high` are the 95 % interval of a bootstrap over speakers, because the clips of a
    speaker are correlated (Bisani & Ney 2004). They are NaN for one speaker.
    """
    columns = ["word_errors", "words", "character_errors", "characters"]
    sums = counts[columns].groupby(speaker).sum().to_numpy(float)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    sampled = sums[drawn].sum(1)  # (resamples, 4)
    found = {}
    for name, place in (("wer", 0), ("cer", 2)):
        total = sums.sum(0)
        found[name] = float(total[place] / total[place + 1]) if total[place + 1] else np.nan
        low, high = np.nan, np.nan
        if len(sums) > 1:
            low, high = np.quantile(sampled[:, place] / sampled[:, place + 1], [0.025, 0.975])
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def table(transcripts: pd.DataFrame, seed: int, resamples: int = 1000) -> pd.DataFrame:
    """Return a row of error rates for each method, split and stratum (and ``all`` strata).

    `transcripts` has a row for each method and clip, with the columns method, split, speaker,
    stratum, reference and hypothesis.
    """
    counts = errors(transcripts["reference"], transcripts["hypothesis"]).set_index(
        transcripts.index
    )
    rows = []
    for (method, split), own in transcripts.groupby(["method", "split"], sort=False):
        strata = sorted(own["stratum"].unique())
        for stratum in ["all", *strata] if len(strata) > 1 else ["all"]:
            part = own if stratum == "all" else own[own["stratum"] == stratum]
            found = rates(counts.loc[part.index], part["speaker"].to_numpy(), seed, resamples)
            about = {"method": method, "split": split, "stratum": stratum, "clips": len(part)}
            words = int(counts.loc[part.index, "words"].sum())
            speakers = part["speaker"].nunique()
            rows.append({**about, "words": words, "speakers": speakers, **found})
    return pd.DataFrame(rows)


def expert_usage(probabilities: Array, expert: Array, stratum: Array) -> pd.DataFrame:
    """Return the usage of experts, a row for each stratum and for ``all``.

    `clips`; ``expert_<e>``, the share of clips decoded by expert e; `entropy`, the entropy of these
    shares; `gate_entropy`, the mean entropy of `probabilities` (n, E) of the gate. Both in nats.
    """
    experts = probabilities.shape[1]
    own = -(probabilities * np.log(np.clip(probabilities, 1e-12, None))).sum(1)
    rows = []
    for name in ["all", *sorted(np.unique(stratum))]:
        part = np.ones(len(stratum), bool) if name == "all" else stratum == name
        shares = np.bincount(expert[part], minlength=experts) / part.sum()
        entropy = float(-(shares * np.log(np.clip(shares, 1e-12, None))).sum())
        named = {f"expert_{number}": float(share) for number, share in enumerate(shares)}
        row = {"stratum": name, "clips": int(part.sum()), **named}
        rows.append({**row, "entropy": entropy, "gate_entropy": float(own[part].mean())})
    return pd.DataFrame(rows)


def agreement(expert: Array, labels: Array) -> float:
    """Adjusted Rand index (Hubert & Arabie 1985) of experts and labels; NaN for one label."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(adjusted_rand_score(labels, expert))
