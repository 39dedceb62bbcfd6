"""Word and character error rates by jiwer, with intervals over speakers; use of the experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from stagesweep.systems.speech.optional import optional_imports

Array = NDArray[Any]


def errors(references: Sequence[str], hypotheses: Sequence[str]) -> pd.DataFrame:
    """Errors and length of each clip: `word_errors`, `words`, `character_errors`, `characters`.

    Errors are substitutions, insertions and deletions of jiwer's alignment.
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
    """Error rates of a corpus: all errors over all words (`wer`) and characters (`cer`).

    `_low` and `_high` are the 95 % interval of a bootstrap over speakers (Bisani & Ney 2004): clips
    of one speaker are alike. It is NaN for one speaker.
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


def table(told: pd.DataFrame, seed: int, resamples: int = 1000) -> pd.DataFrame:
    """Rates of every method, split and stratum (and of ``all`` strata), a row each.

    `told` has a row for each method and clip: method, split, speaker, stratum, reference and
    hypothesis.
    """
    counts = errors(told["reference"], told["hypothesis"]).set_index(told.index)
    rows = []
    for (method, split), own in told.groupby(["method", "split"], sort=False):
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
    """How experts are used in each stratum and in ``all``, a row each.

    `clips`; ``expert_<e>``, the share of clips that expert e told; `entropy` in nats: of these
    shares; `gate_entropy`: the mean entropy of the gate's probabilities `probabilities` (n, E).
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
    """The adjusted Rand index (Hubert & Arabie 1985) of routing with labels; NaN for one label."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(adjusted_rand_score(labels, expert))
