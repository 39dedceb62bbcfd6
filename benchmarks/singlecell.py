"""The GMVAE of gene counts: the cost of exact ZINB, its speed compared with scVI, and the memory of
training from a file.

    python -m benchmarks.singlecell step      training steps: ZINB, NB and MSE; K decodes
    python -m benchmarks.singlecell scvi      cells per second, and those of SCVI (--python)
    python -m benchmarks.singlecell backed    a file of 200,000 x 4,000, its peak memory

`--small` takes seconds. The variants take turns and ratios are medians over the rounds, so other
load of the machine affects all of them alike. Counts are simulated.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn.functional import elu, softplus

from benchmarks import choose
from stagesweep.base.spec import Features, Spec
from stagesweep.loss.cross_entropy import CrossEntropy
from stagesweep.systems.singlecell.data.cells import CellView
from stagesweep.systems.singlecell.loss.count_nll import CountNLL
from stagesweep.systems.singlecell.loss.mixture_kl import MixtureKL
from stagesweep.systems.singlecell.model.gmvae import GMVAE
from stagesweep.systems.singlecell.simulate import Cohort

TYPES = 8
DEVICE = torch.device("cpu")


def cohort(donors: int, cells: int, genes: int) -> Cohort:
    """A simulated cohort in which about a tenth of the counts are not zero."""
    return Cohort(donors, cells, genes, TYPES, 3, genes * 0.2, 1.0, 0.5, 0.15, seed=0)


def spec(genes: int) -> Spec:
    """The spec of the simulated counts."""
    return Spec({"counts": Features(tuple(map(str, range(genes))))}, labels={"label": TYPES})


class Trained:
    """A model and one training step of it: one decode for each cell."""

    def __init__(self, genes: int, **model: Any) -> None:
        torch.manual_seed(0)
        self.model = GMVAE(spec(genes), **model)
        parameters = [*self.model.parameters(), *self.more(genes)]
        self.optimizer = torch.optim.AdamW(parameters, fused=True)
        self.terms = [CountNLL(), MixtureKL("label"), CrossEntropy("label")]
        self.noise = torch.Generator()

    def more(self, genes: int) -> list[nn.Parameter]:
        """Parameters in addition to those of the model."""
        return []

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward, backward, clip, update."""
        self.optimizer.zero_grad()
        batch = batch | self.model.sample_noise(len(batch["label"]), self.noise)
        self.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The negative evidence lower bound and the cross-entropy."""
        outputs = self.model(batch)
        pairs = [term(outputs, batch) for term in self.terms]
        return torch.stack([total / weight for total, weight in pairs]).sum()


class Decodes(Trained):
    """Our decoder, called once for each component, and the usual ZINB with theta per gene."""

    def more(self, genes: int) -> list[nn.Parameter]:
        """The layer of zero inflation after the last hidden layer, as in Lopez et al. (2018)."""
        self.to_dropout = nn.Linear(self.model.to_scores.in_features, genes)
        return list(self.to_dropout.parameters())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The negative evidence lower bound."""
        outputs = self.model(batch)
        shares, bound = outputs["assignment"], outputs["divergence"].mean()
        for k, centre in enumerate(self.model.clusters.centres):
            hidden = self.model.decoder(outputs["latent"] + centre)
            scores, pi = self.model.to_scores(hidden), self.to_dropout(hidden)
            cost = usual(scores, self.model.log_theta, pi, batch)
            bound = bound + (shares[:, k] * cost.sum(1)).mean()
        return bound


class Ancestor(Trained):
    """The decoder and likelihood of GMVAE_ZINB (github.com/wdnlotm/bulk2sc_GMVAE).

    Probability of a zero, mean and theta are per gene, cell and component, each with its own hidden
    layer. The original calls the decoder three times for each component, once for each of these
    outputs, and encodes the cells once for each component. Here the decoder is called once for each
    component, and cells are encoded once.
    """

    def more(self, genes: int) -> list[nn.Parameter]:
        """Layers as wide as those of our decoder."""
        wide, narrow = 512, 256
        self.shared = nn.Sequential(nn.Linear(self.model.latent, narrow), nn.ReLU())
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, genes))
            for _ in range(3)
        )
        return [*self.shared.parameters(), *self.heads.parameters()]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The negative evidence lower bound, weights expanded over genes as there."""
        outputs = self.model(batch)
        decoded = []
        for centre in self.model.clusters.centres:
            hidden = self.shared(outputs["latent"] + centre)
            zero, mean, theta = (head(hidden) for head in self.heads)
            decoded.append((zero.sigmoid(), elu(mean) + 1, elu(theta) + 1))
        cost = stacked(decoded, batch["counts"])
        shares = outputs["assignment"].unsqueeze(1).expand_as(cost)
        return outputs["divergence"].mean() + (cost * shares).sum() / len(cost)


def usual(scores: Tensor, log_theta: Tensor, pi: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """ZINB in logits, computed for every gene of every cell: (B, g)."""
    x, theta = batch["counts"], log_theta.exp()
    mean = batch["library"] * scores.softmax(1)
    log_sum = (theta + mean).log()
    t = theta * (log_theta - log_sum)
    some = t - pi - softplus(-pi) + x * (mean.log() - log_sum)
    some = some + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return -torch.where(x > 0, some, softplus(t - pi) - softplus(-pi))


def stacked(decoded: list[tuple[Tensor, Tensor, Tensor]], x: Tensor, eps: float = 1e-10) -> Tensor:
    """ZINB in probabilities for each component: (B, g, k).

    Both cases, zero and not, are computed for every gene of every cell before one is selected.
    """
    none = [
        -torch.log(zero + (1 - zero) * torch.pow(theta / (mean + theta + eps), theta) + eps)
        for zero, mean, theta in decoded
    ]
    gammas = [
        torch.lgamma(x + 1) + torch.lgamma(theta + eps) - torch.lgamma(x + theta + eps)
        for _, _, theta in decoded
    ]
    rest = [
        (theta + x) * torch.log(theta + mean + eps) - torch.log(1 - zero + eps)
        - theta * torch.log(theta + eps) - x * torch.log(mean + eps)
        for zero, mean, theta in decoded
    ]  # fmt: skip
    some = torch.stack(gammas, 2) + torch.stack(rest, 2)
    return torch.where(x.unsqueeze(2).expand_as(some) > 0, some, torch.stack(none, 2))


def turns(
    steps: dict[str, Callable[[], object]], rounds: int, against: str
) -> dict[str, tuple[float, float]]:
    """Median seconds of each step, and the median ratio to `against` over the rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = perf_counter()
            step()
            if number:  # the first one warms up
                seconds[name].append(perf_counter() - started)
    base = seconds[against]
    return {
        name: (
            statistics.median(own),
            statistics.median(a / b for a, b in zip(own, base, strict=True)),
        )
        for name, own in seconds.items()
    }


def step(options: argparse.Namespace) -> None:
    """One training step of 512 cells x 2,000 genes."""
    rounds, genes, size = (3, 500, 64) if options.small else (options.rounds, 2000, 512)
    drawn = cohort(2, size, genes).table()
    codes = torch.from_numpy(drawn.obs["cell_type"].astype("category").cat.codes.to_numpy("int64"))
    (batch, *_) = CellView(drawn.counts, {"label": codes.clamp(max=TYPES - 1)}).batches(size)
    density = float((batch["counts"] > 0).float().mean())
    print(
        f"{size} cells x {genes} genes, {density:.0%} not zero, {torch.get_num_threads()} threads"
    )
    kinds = {name: Trained(genes, likelihood=name) for name in ("mse", "nb", "zinb")}
    steps = {name: (lambda t=t: t.step(batch)) for name, t in kinds.items()}
    for name, (median, ratio) in turns(steps, rounds, "mse").items():
        print(f"{name:18}{median * 1e3:10.1f} ms   {ratio:6.2f} x mse", flush=True)
    folds = {f"{TYPES} decodes": Decodes(genes), "as its ancestor": Ancestor(genes)}
    steps = {"zinb": steps["zinb"]} | {n: (lambda t=t: t.step(batch)) for n, t in folds.items()}
    for name, (median, ratio) in turns(steps, max(2, rounds // 5), "zinb").items():
        print(f"{name:18}{median * 1e3:10.1f} ms   {ratio:6.2f} x zinb", flush=True)


SCVI = """
import sys, time, warnings, logging
warnings.simplefilter("ignore")
import anndata, numpy, scvi, torch
torch.set_num_threads(int(sys.argv[2]))
logging.getLogger("lightning").setLevel(logging.ERROR)
scvi.settings.verbosity = 40
cells = anndata.read_h5ad(sys.argv[1])
scvi.model.SCVI.setup_anndata(cells)
model = scvi.model.SCVI(cells, n_hidden=256, n_layers=2, n_latent=64)
options = dict(accelerator="cpu", batch_size=512, train_size=1.0, enable_progress_bar=False,
               shuffle_set_split=False, logger=False)
model.train(max_epochs=1, **options)
started = time.perf_counter()
model.train(max_epochs=int(sys.argv[3]), **options)
print(scvi.__version__, (time.perf_counter() - started) / int(sys.argv[3]))
"""


def scvi(options: argparse.Namespace) -> None:
    """Time an epoch of GMVAE and SCVI: batches of 512, two layers of 256, latent 64, ZINB."""
    cells, genes = (2000, 500) if options.small else (20_000, 2000)
    rounds, epochs = (1, 1) if options.small else (min(3, options.rounds), 2)
    drawn = cohort(10, cells // 10, genes).table()
    codes = torch.from_numpy(drawn.obs["cell_type"].astype("category").cat.codes.to_numpy("int64"))
    view, ours = CellView(drawn.counts, {"label": codes}), Trained(genes, hidden=(256, 256))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/cells.h5ad"
        write(path, drawn.genes, [(drawn.counts, drawn.obs)])
        pairs = []
        for _ in range(rounds):
            own = min(epoch(ours, view) for _ in range(epochs))
            words = [options.python, "-c", SCVI, path, str(torch.get_num_threads()), str(epochs)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"SCVI did not run ({options.python}): {done.stderr[-600:]}")
            version, theirs = done.stdout.split()[-2:]
            pairs.append((cells / own, cells / float(theirs)))
            print(f"GMVAE {pairs[-1][0]:8.0f} cells/s   SCVI {version} {pairs[-1][1]:8.0f} cells/s")
    print(f"ratio {statistics.median(a / b for a, b in pairs):.2f} (median)")


def epoch(trained: Trained, view: CellView) -> float:
    """Seconds of one pass over the cells, in random order."""
    started = perf_counter()
    for batch in view.gather(view.order(512, torch.Generator().manual_seed(0))):
        trained.step(batch)
    return perf_counter() - started


def backed(options: argparse.Namespace) -> None:
    """Train for an epoch on a file with the real command, and measure its memory."""
    donors, cells, genes = (20, 100, 300) if options.small else (options.donors, 2000, 4000)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, drawn = f"{folder}/cells.h5ad", cohort(donors, cells, genes)
        write(path, drawn.names, drawn.draw())
        size = Path(path).stat().st_size / 1e9
        print(f"{donors * cells:,} cells x {genes:,} genes, {size:.2f} GB on disk", flush=True)
        words = ["experiment=singlecell_full", f"data.path={path}", "stage.gmvae.epochs=1"]
        words += ["data.columns.donor=donor", "data.columns.condition=condition"]
        words += ["stage.gmvae.batch_size=512", "hardware.micro_batch=null", "hardware.workers=0"]
        words += ["hardware.device=cpu", "~stage.baselines", f"hydra.run.dir={folder}/run"]
        environment = os.environ | {"STAGESWEEP_STORE": f"{folder}/store"}
        command = [sys.executable, "-m", "stagesweep", *words]
        started = perf_counter()
        subprocess.run(command, check=True, env=environment)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
        print(f"one epoch and its scores: {perf_counter() - started:.0f} s, peak {peak:.2f} GiB")


def write(path: str, genes: Sequence[str], chunks: Any) -> None:
    """Write an .h5ad file in CSR chunk by chunk, so that it is never in memory as a whole."""
    import anndata
    import h5py

    tables: list[pd.DataFrame] = []
    ends = [np.zeros(1, np.int64)]
    with (
        h5py.File(path, "w") as file,
        warnings.catch_warnings(),
        anndata.settings.override(allow_write_nullable_strings=True),
    ):
        warnings.simplefilter("ignore")
        empty = csr_matrix((0, len(genes)), dtype=np.float32)
        frame = anndata.AnnData(empty, var=pd.DataFrame(index=pd.Index(genes, dtype=object)))
        for name, part in {"var": frame.var, "X": frame.X}.items():
            anndata.io.write_elem(file, name, part)
        matrix = file["X"]
        for name, kind in (("data", "float32"), ("indices", "int32")):
            del matrix[name]
            matrix.create_dataset(name, (0,), kind, maxshape=(None,), chunks=(1 << 16,))
        for counts, obs in chunks:
            tables.append(obs)
            start = int(ends[-1][-1])
            for name in ("data", "indices"):
                matrix[name].resize((start + counts.nnz,))
                matrix[name][start:] = getattr(counts, name)
            ends.append(counts.indptr[1:].astype(np.int64) + start)
        del matrix["indptr"]
        matrix["indptr"] = np.concatenate(ends)
        cells = pd.concat(tables)
        matrix.attrs["shape"] = (len(cells), len(genes))
        anndata.io.write_elem(file, "obs", cells)
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def main(arguments: list[str] | None = None) -> None:
    """Run one benchmark, or all."""
    benchmarks = {"step": step, "scvi": scvi, "backed": backed}
    parser = choose.parser(__doc__, benchmarks)
    parser.add_argument("--python", default=sys.executable, help="a Python that has scvi-tools")
    parser.add_argument(
        "--donors", type=int, default=100, help="donors in the large file, of 2,000 cells each"
    )
    parser.add_argument("--folder", help="folder of the large temporary file")
    choose.run(parser, benchmarks, arguments)


if __name__ == "__main__":
    main()
