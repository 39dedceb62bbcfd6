"""Damaged data files, read by every reader in a process forked for each of them."""

import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import soundfile
import tokenizers  # noqa: F401 (what readers import is imported once, before the forks)
import torch
import transformers.models.whisper.english_normalizer  # noqa: F401
from hydra.utils import instantiate
from omegaconf import OmegaConf
from scipy import sparse

from fuzz.damage import HOSTILE, Chance, broken_text, damage_file, damaged, table, zipped
from fuzz.judge import Fault, look
from stagesweep.base.errors import UserError
from stagesweep.config import register
from stagesweep.systems.audiogram.simulate import simulate
from stagesweep.systems.singlecell.data import dataset as _  # noqa: F401
from stagesweep.systems.speech.data import dataset as __  # noqa: F401

LIMIT = 60  # seconds that a small file may take


def read(chance: Chance, folder: Path, prepare: Callable[[Chance, Path], dict[str, Any]]) -> str:
    """Prepare a damaged file and read it in a forked process; ``ran``, ``refused``, or Fault."""
    output, began = folder / "output.txt", time.monotonic()
    child = os.fork()
    if not child:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os._exit(work(chance, folder, prepare))
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() - began > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Fault(f"still reading after {LIMIT} s")
        time.sleep(0.002)
    text, status = output.read_text(errors="replace"), os.waitstatus_to_exitcode(ended[1])
    try:
        look(text)
    except Fault as fault:
        raise Fault(f"{fault}\n{brief(text)}") from fault
    if status not in (0, 1):
        raise Fault(f"ended with status {status}: {text[-500:]}")
    return "refused" if status else "ran"


def brief(text: str) -> str:
    """The lines of tracebacks in our own code, and what was raised."""
    lines = text.strip().splitlines()
    own = [n for n, line in enumerate(lines) if "src/stagesweep" in line]
    kept = {n + more for n in own for more in (0, 1)} | set(range(len(lines) - 3, len(lines)))
    return "\n".join(line for n, line in enumerate(lines) if n in kept)[-2000:]


def work(chance: Chance, folder: Path, prepare: Callable[[Chance, Path], dict[str, Any]]) -> int:
    """Read in this process; return its exit status. Faults are printed as a traceback."""
    os.chdir(folder)
    os.environ["STAGESWEEP_FEATURES"] = str(folder / "features")
    logging.basicConfig(stream=sys.stdout, force=True)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = prepare(chance, folder)
        warnings.simplefilter("error")
        data = instantiate(settings, _convert_="all", _execution_whitelist_=("stagesweep.*",))
        for split in ("train", "val", "test"):
            view = data.split(split).prepare(torch.device("cpu"), 0)
            for batch in view.batches(64):
                assert {len(column) for column in batch.values()} != {0}
            assert len(data.ids(split)) == len(view)
        print("read", flush=True)
        return 0
    except UserError as error:
        line = str(error)
        print(line, flush=True)
        if len(line.splitlines()) != 1 or len(line) > 2000:
            print(f"Traceback (most recent call last) of a message of several lines: {line!r}")
        sys.stdout.flush()
        return 1
    except BaseException:
        traceback.print_exc()
        return 1


def config(group: str, name: str, **changes: Any) -> dict[str, Any]:
    """The YAML of a data set, with the defaults it names, as the command would compose it."""
    folder = register.folder() / group
    node: Any = OmegaConf.load(folder / f"{name}.yaml")
    for parent in node.pop("defaults", ()):
        if parent != "_self_":
            node = OmegaConf.merge(OmegaConf.load(folder / f"{parent}.yaml"), node)
    found: dict[str, Any] = OmegaConf.to_container(OmegaConf.merge(node, changes))
    return found


def options(chance: Chance, **choices: tuple[Any, ...]) -> dict[str, Any]:
    """Some options with a random one of their values."""
    return {key: chance.choice(values) for key, values in choices.items() if chance.random() < 0.12}


# ------------------------------------------------------------------------------ audiograms


def audiogram_file(chance: Chance, folder: Path) -> Path:
    """A damaged table of audiograms."""
    cohort = simulate(chance.choice((12, 60, 60)), 30, 0.2, 0.7, 0.9, 6.0, 0.3, chance.randrange(9))
    cohort["equipment_group"] = cohort["equipment_model"]
    rows = cohort.astype(object).where(cohort.notna(), "").to_dict("records")
    content = table(rows, chance)
    if chance.random() < 0.4:
        content = damaged(content, chance)
    file = folder / chance.choice(("mice.csv", "mice.csv.gz", "mäuse & co, 1=2.csv"))
    file.write_bytes(zipped(content, chance) if file.suffix == ".gz" else content)
    return file


def audiogram(chance: Chance, folder: Path) -> dict[str, Any]:
    """The audiogram reader on a damaged table."""
    group = chance.choice(("audiogram", "audiogram", "audiogram_unlabelled"))
    given = options(
        chance, standardise=("global", "equipment"), pca=(0, 1, 6, 99, -1), clip=(True, False),
        separator=("comma", "semicolon", "tab", "x"), decimal=("comma", "point", "x"),
        out_of_range=("missing", "x"), duplicates=("unique", "merge", "x"), min_group=(0, 1, 10**6),
        fractions=([0.7, 0.15, 0.15], [1, 0, 0], [0.4, 0.3, 0.3], [2, -1, 0], [0.5, 0.5]),
        split_by=([], ["gene"], ["no"]), tile=(0, 1, 2), split_seed=(0, 5, -1),
    )  # fmt: skip
    return config("data", group, path=str(audiogram_file(chance, folder)), **given)


# ------------------------------------------------------------------------------ single cells


def cells_file(chance: Chance, folder: Path) -> Path:
    """A damaged .h5ad file: its bytes, or what it holds."""
    random = np.random.default_rng(chance.randrange(100))
    cells, genes = chance.choice(((40, 15), (6, 4), (80, 15)))
    counts: Any = random.poisson(1.0, (cells, genes)).astype(chance.choice(("f4", "i8", "f8")))
    if chance.random() < 0.3:
        counts = counts.astype("f8")
        counts[random.integers(cells), random.integers(genes)] = chance.choice(
            (-1, 0.5, np.nan, np.inf, 1e300, 1e9)
        )
    how = chance.choice((0, 1, 1, 2, 3))
    x = (counts, sparse.csr_matrix(counts), sparse.csc_matrix(counts), None)[how]
    distinct, donors = chance.choice((cells,) * 5 + (3,)), chance.choice((4, 20))
    names = [f"c{n % distinct}" for n in range(cells)]
    genes_named = chance.choice((genes,) * 5 + (2,))
    obs = {
        "cell_type": [("a", "b", "c")[n % 3] for n in range(cells)],
        "donor": [str(n % donors) for n in range(cells)],
        "condition": [("x", "y")[n % 2] for n in range(cells)],
    }
    if chance.random() < 0.3:
        obs[chance.choice(list(obs))] = [chance.choice((None, "", "é", "z")) for _ in range(cells)]
    if chance.random() < 0.2:
        del obs[chance.choice(list(obs))]
    made = anndata.AnnData(
        X=x,
        obs=pd.DataFrame(obs, index=names),
        var=pd.DataFrame(index=[f"g{n % genes_named}" for n in range(genes)]),
        layers={"counts": counts} if chance.random() < 0.5 else {},
    )
    if chance.random() < 0.2 and x is not None:
        made.raw = made
    file = folder / "cells.h5ad"
    with anndata.settings.override(allow_write_nullable_strings=True):
        made.write_h5ad(file)
    return file


def change_members(file: Path, chance: Chance) -> None:
    """Remove or replace members and attributes of an HDF5 file."""
    with h5py.File(file, "r+") as root:
        names: list[str] = []
        root.visit(names.append)
        for name in chance.sample(names, min(len(names), chance.choice((1, 2)))):
            if name not in root:
                continue
            match chance.randrange(4):
                case 0:
                    del root[name]
                case 1:
                    del root[name]
                    root[name] = chance.choice(
                        (np.zeros(0), np.zeros((2, 2)), "text", [b"a", b"b"], -1, np.full(3, -5))
                    )
                case 2 if len(root[name].attrs):
                    del root[name].attrs[chance.choice(list(root[name].attrs))]
                case _:
                    for key in list(root[name].attrs)[:1]:
                        root[name].attrs[key] = chance.choice(("csr_matrix", "x", 5, "dataframe"))


def singlecell(chance: Chance, folder: Path) -> dict[str, Any]:
    """The reader of single cells on a damaged file, in memory or backed."""
    file = cells_file(chance, folder)
    if (kind := chance.random()) < 0.4:
        damage_file(file, chance)
    elif kind < 0.7:
        change_members(file, chance)
    given = options(
        chance, layer=("counts", "raw", "no"), min_cells=(0, 1, 100), min_genes=(0, 5, 100),
        variable=(1, 5, 0, -1), split_by=("donor", "cell", "x"), drop=(["a"], ["a", "b", "c"]),
        duplicate_cells=("unique", "x"), duplicate_genes=("unique", "merge", "x"),
        paired=(True,), fractions=([0.4, 0.3, 0.3], [1, 0, 0], [0.5, 0.5]), split_seed=(3, -1),
        columns=({"donor": "donor", "condition": "condition"}, {"label": "no"}, {"donor": "donor"}),
    )  # fmt: skip
    backed = chance.random() < 0.5
    return config("data", "singlecell", path=str(file), backed=backed, **given)


# ------------------------------------------------------------------------------ speech


def clips(chance: Chance, folder: Path) -> list[dict[str, Any]]:
    """Audio files and the rows of their table."""
    random, rows = np.random.default_rng(0), []
    for number in range(16):
        name = f"{number}.{chance.choice(('wav', 'wav', 'flac'))}"
        soundfile.write(folder / name, random.normal(0, 0.1, 1000 + 40 * number), 8000)
        speaker = number % 8
        rows.append(
            {"path": name, "transcript": ("one", "two 2", "three", "a b")[number % 4],
             "speaker": f"s{speaker}", "stratum": "ab"[speaker % 2], "row": number,
             "split": ("train", "train", "val", "test")[speaker % 4]}
        )  # fmt: skip
    return rows


def clips_table(rows: list[dict[str, Any]], chance: Chance, folder: Path, harm: bool) -> Path:
    """The table of clips, damaged or not, as CSV or JSON lines."""
    file = folder / chance.choice(("clips.csv", "clips.jsonl", "clips.json"))
    if file.suffix == ".csv":
        content = table(rows, chance) if harm else pd.DataFrame(rows).to_csv(index=False).encode()
    else:
        if harm and chance.random() < 0.5:
            row = chance.choice(rows)
            odd = (*HOSTILE, [1], {"a": 1}, None, 1.5, True)
            row[chance.choice(list(row))] = chance.choice(odd)
        text = "\n".join(json.dumps(row) for row in rows)
        content = broken_text(text, chance) if harm else text.encode()
    if harm and chance.random() < 0.3:
        content = damaged(content, chance)
    file.write_bytes(content)
    return file


def speech(chance: Chance, folder: Path, harm: bool = True, **given: Any) -> dict[str, Any]:
    """The reader of speech on a damaged table."""
    file = clips_table(clips(chance, folder), chance, folder, harm)
    small = {"seconds": 0.4, "rate": 8000, "bands": 20, "vocabulary": 64}
    given |= options(
        chance, on_error=("skip", "x"), long=("cut", "split", "x"), split_by=("clip", "x"),
        drop=(["a"], ["no"]), hold_out=(["s1"], ["no"]), fraction=(0.5, 0.0, 2.0),
        seconds=(0.1, 0.0, -1.0, 0.33), vocabulary=(1, 10), shared_speakers=(True,),
        normaliser=("basic", "x"), fractions=([0.4, 0.3, 0.3], [1, 0, 0]), bands=(1, 0),
    )  # fmt: skip
    columns = options(
        chance, stratum=("stratum", "no"), split=("split",), path=(None,), speaker=(None,)
    )
    columns |= given.pop("columns", {})
    return config("data", "speech", path=str(file), columns=columns, **(small | given))


def audio(chance: Chance, folder: Path) -> dict[str, Any]:
    """The reader of speech on damaged audio."""
    settings = speech(chance, folder, harm=False)
    sounds = sorted(file for file in folder.iterdir() if file.suffix in (".wav", ".flac"))
    for file in chance.sample(sounds, chance.choice((1, 3, 16))):
        damage_file(file, chance)
    return settings


def features(chance: Chance, folder: Path) -> dict[str, Any]:
    """The reader of speech on a damaged file of features."""
    lengths = [0, *np.cumsum([20 + n for n in range(16)])]
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "cepstra": random.normal(size=(lengths[-1], 13)).astype("f4"),
        "offsets": np.array(lengths),
    }
    if chance.random() < 0.6:
        name = chance.choice(list(arrays))
        value = arrays[name]
        arrays[name] = chance.choice(
            (value.ravel(), value[:3], -value, value[::-1], value.astype(str), value[None],
             np.array(5), np.array([{}]), value * np.nan, value * 10**6, np.zeros(0), value + 0.5)
        )  # fmt: skip
    if chance.random() < 0.2:
        arrays["features"] = arrays.pop(chance.choice(list(arrays)))
    file = folder / "features.npz"
    chance.choice((np.savez, np.savez_compressed))(file, **arrays)
    if chance.random() < 0.5:
        damage_file(file, chance)
    given = {"row": chance.choice(("row", "row", "row", "speaker", None)), "path": None}
    return speech(chance, folder, harm=False, features=str(file), columns=given, bands=13)
