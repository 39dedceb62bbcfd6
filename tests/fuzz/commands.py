"""Random commands, and commands on damaged configs, data, checkpoints, stores and studies."""

import json
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any

import yaml

from fuzz import judge, readers
from fuzz.damage import HOSTILE, NUMBERS, Chance, broken_text, damage_file, damaged, misspelt
from fuzz.judge import Fault
from stagesweep.config import register

if TYPE_CHECKING:
    from conftest import Process, Warm

HERE = Path(__file__).parent
# A run that goes on longer than this is asked to stop, and has to.
PATIENCE, GRACE = 20, 60

EXPERIMENTS = {
    "quick": """# @package _global_
defaults:
  - /loss@loss.reconstruction: reconstruction
  - /loss@loss.kl: kl
  - /stage@stage.pretrain: fit
  - /stage@stage.joint: fit
  - override /data: digits
  - override /model: vae_base
  - _self_
hardware: {device: cpu}
model: {latent: 3, hidden: [8], clusters: 3}
stage:
  pretrain: {epochs: 2, batch_size: 512, loss: {reconstruction: {weight: 1.0}}}
  joint: {epochs: 1, batch_size: 512, loss: {reconstruction: {weight: 1.0}, kl: {weight: 0.1}}}
objective: {metric: joint/val_loss, mode: min}
""",
    "quick_audiogram": """# @package _global_
defaults:
  - /loss@loss.reconstruction: reconstruction
  - /stage@stage.pretrain: fit
  - override /data: audiogram
  - override /model: vae_base
  - _self_
hardware: {device: cpu}
stage: {pretrain: {epochs: 1, loss: {reconstruction: {weight: 1.0}}}}
objective: {metric: pretrain/train_loss, mode: min}
""",
    "quick_singlecell": """# @package _global_
defaults:
  - /loss@loss.counts: counts
  - /loss@loss.mixture: mixture
  - /stage@stage.gmvae: fit
  - override /data: singlecell
  - override /model: singlecell
  - _self_
hardware: {device: cpu}
loss: {mixture: {label: label}}
stage: {gmvae: {part: cells, epochs: 1, loss: {counts: {weight: 1.0}, mixture: {weight: 1.0}}}}
objective: {metric: gmvae/train_loss, mode: min}
""",
    "quick_speech": """# @package _global_
defaults:
  - /loss@loss.tokens: tokens
  - /stage@stage.base: pretrain
  - override /data: speech
  - override /model: whisper_tiny
  - _self_
hardware: {device: cpu, workers: 0}
data: {seconds: 0.4, rate: 8000, bands: 20, vocabulary: 64}
stage: {base: {epochs: 1, loss: {tokens: {weight: 1.0}}}}
objective: {metric: base/train_loss, mode: min}
""",
}


class Bench:
    """A folder to work in, and the command as a user types it, in a warm process."""

    def __init__(self, folder: Path, warm: "Warm") -> None:
        self.folder, self.warm = folder, warm
        self.conf = folder / "conf"
        (self.conf / "experiment").mkdir(parents=True)
        for name, text in EXPERIMENTS.items():
            (self.conf / "experiment" / f"{name}.yaml").write_text(text)

    def command(
        self, folder: Path, *arguments: str, conf: Path | None = None, patience: float = PATIENCE
    ) -> "CompletedProcess[str]":
        """Run the command in a folder to its end; one that takes long is asked to stop."""
        given = [f"--config-dir={conf or self.conf}", *arguments]
        process = self.warm.start(given, folder, {"STAGESWEEP_STORE": str(folder / "store")})
        return finish(process, patience)

    def judged(self, folder: Path, *arguments: str, **how: Any) -> str:
        """Run the command and judge its answer."""
        (folder / "command.txt").write_text("\n".join(map(repr, arguments)))
        process = self.command(folder, *arguments, **how)
        (folder / "answer.txt").write_text(process.stdout + process.stderr)
        try:
            return judge.judge(process, folder)
        except Fault as fault:
            said = (process.stdout + process.stderr).strip()
            raise Fault(f"{fault}\n{list(arguments)}\n{said[-1500:]}") from fault

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every key of the quick experiment, Hydra's own too, with its value."""
        folder = self.folder / "keys"
        folder.mkdir()
        process = self.command(folder, "experiment=quick", "--cfg", "all")
        return flat(yaml.safe_load(process.stdout))

    @cached_property
    def groups(self) -> list[tuple[str, str]]:
        """Every config group, with each of its options."""
        root = register.folder()
        files = [file.relative_to(root).with_suffix("") for file in root.rglob("*/*.yaml")]
        return sorted((file.parent.as_posix(), file.name) for file in files)

    @cached_property
    def run(self) -> tuple[Path, Any]:
        """The folder of a finished run, and its objective."""
        return self.template("run", "experiment=quick", "hydra.run.dir=run")

    @cached_property
    def sweep(self) -> tuple[Path, Any]:
        """The folder of a finished sweep, and the objectives of its trials."""
        return self.template("sweep", *SWEEP)

    def template(self, name: str, *arguments: str) -> tuple[Path, Any]:
        folder = self.folder / "templates" / name
        folder.mkdir(parents=True)
        process = self.command(folder, *arguments, patience=GRACE)
        assert process.returncode == 0, process.stdout + process.stderr
        return folder, results(folder)


SWEEP = ("-m", "experiment=quick", "seed=1,2,3", "hydra.sweep.dir=sweep", "sweep.slots=1")


def finish(process: "Process", patience: float) -> "CompletedProcess[str]":
    """Wait for the end of a command; ask it to stop when it takes long."""
    import signal
    import time

    until = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(GRACE)
    except TimeoutExpired as error:
        said = "".join(process.output())
        raise Fault(f"does not stop: {process.args}\n{said[-500:]}") from error
    return CompletedProcess(process.args, status, *process.output())


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """The leaves and the mappings of a config by dotted key."""
    found = {path: node} if path else {}
    if isinstance(node, dict):
        for key, value in node.items():
            found |= flat(value, f"{path}.{key}".lstrip("."))
    return found


def results(folder: Path) -> Any:
    """The objectives of the finished runs below a folder."""
    files = sorted(folder.rglob("result.json"))
    return {
        str(file.relative_to(folder)): [
            dict(stage["metrics"]) for stage in json.loads(file.read_text())["stages"]
        ]
        for file in files
    }


# ------------------------------------------------------------------------------ command lines


def value(chance: Chance, own: Any) -> str:
    """A value for a key: its own, of another type, or hostile text; perhaps in quotes."""
    plain = own if isinstance(own, str | int | float | bool) else chance.choice(NUMBERS)
    text = str(
        chance.choice(
            (plain, chance.choice(NUMBERS), chance.choice(HOSTILE), chance.choice(HOSTILE))
        )
    )
    quoted = (text, text, text, f"'{text}'", f'"{text}"', f"[{text}]", f"{{a: {text}}}")
    return chance.choice(quoted)


def override(chance: Chance, bench: Bench) -> str:
    """One word of a command line."""
    if chance.random() < 0.15:
        group, option = chance.choice(bench.groups)
        if chance.random() < 0.3:
            option = misspelt(option, chance)
        place = chance.choice(("", "", f"@{group}.x", "@_global_", "@x", f"@{group}"))
        return f"{chance.choice(('', '', '+', '++', '~'))}{group}{place}={option}"
    key = chance.choice(list(bench.keys))
    own = bench.keys[key]
    folder = key.startswith("hydra.") and key.endswith((".dir", "subdir"))
    given = (
        chance.choice(("x", "'a b'", "é", "${seed}", "{x}", "")) if folder else value(chance, own)
    )
    if chance.random() < 0.15:
        key = misspelt(key, chance)
    sign = chance.choice(("", "", "", "", "+", "++", "~"))
    if sign == "~" and chance.random() < 0.7:
        return f"~{key}"
    return f"{sign}{key}={given}"


def single(chance: Chance, folder: Path, bench: Bench) -> str:
    """A run with some random overrides."""
    given = [override(chance, bench) for _ in range(chance.choice((1, 1, 2, 3)))]
    return bench.judged(folder, *shuffled(chance, "experiment=quick", *given))


def sweeps(chance: Chance, folder: Path, bench: Bench) -> str:
    """A sweep with some random overrides, most of them swept."""
    given = []
    for _ in range(chance.choice((1, 2))):
        text = override(chance, bench)
        if chance.random() < 0.6 and "=" in text:
            text += "," + value(chance, None)
        given.append(text)
    search = chance.choice(("grid", "grid", "random", "bayes", "qmc", "nsga2", "ablation"))
    own = ("-m", "experiment=quick", f"search={search}", "search.n_trials=2", "sweep.slots=2")
    return bench.judged(folder, *shuffled(chance, *own, *given))


def shuffled(chance: Chance, *words: str) -> list[str]:
    """The words of a command line in another order, now and then."""
    return chance.sample(words, len(words)) if chance.random() < 0.3 else list(words)


def helps(chance: Chance, folder: Path, bench: Bench) -> str:
    """Help, versions, printed configs, and flags that there are not."""
    flags = (
        ["--help"], ["--hydra-help"], ["--version"], ["--cfg", "job"], ["--cfg", "all"],
        ["--cfg", "job", "--resolve"], ["--cfg", "job", "-p", "stage.joint"],
        ["--cfg", "hydra", "-p", "no.such"], ["--cfg", "x"], ["--info"], ["--info", "defaults"],
        ["--info", "defaults-tree"], ["--info", "plugins"], ["--info", "x"],
        ["--info", "searchpath"], ["--info", "config"], ["-sc", "install=bash"],
        ["-sc", "query=bash"], ["-sc", "x"], ["--no-such"],
        ["--config-name", "x"], ["--config-path", "x"], ["--config-dir", "no such"], ["-h"], ["-c"],
        ["--experimental-rerun", "x"], ["--run", "--multirun"], ["-x"], ["--"], ["--package"],
    )  # fmt: skip
    given = list(chance.choice(flags))
    names = sorted(option for group, option in bench.groups if group == "experiment")
    if chance.random() < 0.7:
        given.append(f"experiment={chance.choice([*names, 'quick', 'qick', ''])}")
    if chance.random() < 0.5:
        given.append(override(chance, bench))
    return bench.judged(folder, *shuffled(chance, *given))


def real(chance: Chance, folder: Path, bench: Bench) -> str:
    """A real experiment with a random override, stopped after some seconds."""
    names = sorted(option for group, option in bench.groups if group == "experiment")
    given = [f"experiment={chance.choice(names)}", override(chance, bench)]
    return bench.judged(folder, *given, patience=chance.choice((6, 10)))


# ------------------------------------------------------------------------------ configs


def configs(chance: Chance, folder: Path, bench: Bench) -> str:
    """A damaged YAML in a folder of configs."""
    conf = folder / "conf"
    shutil.copytree(bench.conf, conf)
    group, option = chance.choice([*bench.groups, *[("experiment", "quick")] * 40])
    own = bench.conf / group / f"{option}.yaml"
    source = own if own.exists() else register.folder() / group / f"{option}.yaml"
    target = conf / group / "mine.yaml"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = source.read_text()
    match chance.randrange(4):
        case 0:
            target.write_bytes(damaged(text.encode(), chance))
        case 1:
            target.write_bytes(broken_text(text, chance))
        case _:
            target.write_text(changed(text, chance))
    multirun = ["-m", "seed=1,2", "sweep.slots=1"] if chance.random() < 0.2 else []
    if group == "experiment":
        return bench.judged(folder, *multirun, "experiment=mine", conf=conf, patience=8)
    return bench.judged(
        folder, *multirun, "experiment=quick", f"{group}=mine", conf=conf, patience=8
    )


def changed(text: str, chance: Chance) -> str:
    """A YAML with other values, keys and kinds of nodes."""
    head = "".join(f"{line}\n" for line in text.splitlines() if line.startswith("#"))
    tree = yaml.safe_load(text) or {}
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(tree)
    odd: tuple[Any, ...] = (None, True, 0, -1, 1.5, [], {}, [1, [2]], {"a": {"b": None}}, {1: 2})
    for node, key in chance.sample(places, min(len(places), chance.choice((1, 1, 2)))):
        if (isinstance(node, list) and key >= len(node)) or (
            isinstance(node, dict) and key not in node
        ):
            continue
        match chance.randrange(4):
            case 0:
                del node[key]
            case 1:
                node[key] = chance.choice(odd)
            case 2:
                node[key] = chance.choice(HOSTILE)
            case _ if isinstance(node, dict):
                node[misspelt(str(key), chance)] = node.pop(key)
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------ data


def data(chance: Chance, folder: Path, bench: Bench) -> str:
    """A whole run on a damaged data file."""
    prepare: Callable[..., dict[str, Any]] = chance.choice(
        (readers.audiogram, readers.singlecell, readers.speech, readers.audio, readers.features)
    )
    status = folder / "settings.json"
    child = readers.os.fork()
    if not child:
        readers.warnings.simplefilter("ignore")
        status.write_text(json.dumps(prepare(chance, folder)))
        readers.os._exit(0)
    readers.os.waitpid(child, 0)
    kind = prepare.__name__ if prepare.__name__ in ("audiogram", "singlecell") else "speech"
    conf = folder / "conf"
    shutil.copytree(bench.conf, conf)
    (conf / "data").mkdir()
    (conf / "data" / "mine.yaml").write_text(yaml.safe_dump(json.loads(status.read_text())))
    return bench.judged(folder, f"experiment=quick_{kind}", "data=mine", conf=conf)


# ------------------------------------------------------------------------------ stores, studies


def stores(chance: Chance, folder: Path, bench: Bench) -> str:
    """A run whose earlier results are damaged: in the store, as checkpoints, or in its folder."""
    template, wanted = bench.run
    shutil.copytree(template, folder, dirs_exist_ok=True)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    # What is damaged is read: later stages, which are in no store any more, run again.
    if chance.random() < 0.7:
        for file in files:
            stage = file.parts[-2] if file.name == "manifest.json" else ""
            text = file.read_text() if stage else ""
            if '"stage": "joint"' in text or (stage and chance.random() < 0.3):
                file.unlink()
    chosen = [file for file in files if file.exists() and "trash" not in file.parts]
    harmed = chance.sample(chosen, chance.choice((1, 1, 3)))
    for file in harmed:
        if file.exists():
            damage_file(file, chance)
    names = [str(file.relative_to(folder)) for file in harmed]
    (folder / "harmed.txt").write_text("\n".join(names))
    own = ("experiment=quick", "hydra.run.dir=run")
    answer = bench.judged(folder, *own)
    if answer == "ran" and (found := results(folder)) != wanted:
        raise Fault(f"another result after damage to {names}: {found}, not {wanted}")
    if answer == "refused" and all(name.startswith("store/") for name in names):
        if bench.judged(folder, *own, "resume=never") != "ran":
            raise Fault(f"resume=never does not mend damage to {names}")
        if (found := results(folder)) != wanted:
            raise Fault(f"another result with resume=never: {names}")
    return answer


def weights(chance: Chance, folder: Path, bench: Bench) -> str:
    """A run that starts from a damaged checkpoint."""
    template, _ = bench.run
    source = chance.choice(sorted((template / "run").rglob("*.pt")))
    file = folder / chance.choice(("weights.pt", "stage/weights.pt"))
    file.parent.mkdir(exist_ok=True)
    shutil.copy(source, file)
    damage_file(file, chance)
    path = file.parent if file.parent != folder and chance.random() < 0.5 else file
    return bench.judged(folder, "experiment=quick", f"init_from={path}")


def studies(chance: Chance, folder: Path, bench: Bench) -> str:
    """A sweep whose study, manifest or trials are damaged, run again."""
    template, wanted = bench.sweep
    shutil.copytree(template, folder, dirs_exist_ok=True)
    base = folder / "sweep"
    files = sorted(file for file in base.rglob("*") if file.is_file())
    preferred = [base / "study.db", base / "study.db", base / "sweep.yaml", base / "sweep.yaml"]
    harmed = chance.choice([*preferred * 4, *files])
    damage_file(harmed, chance)
    (folder / "harmed.txt").write_text(str(harmed.relative_to(folder)))
    more = chance.choice(
        (
            [],
            [],
            ["search.retry_failed=true"],
            ["sweep.on_change=continue"],
            ["sweep.on_change=new"],
        )
    )
    answer = bench.judged(folder, *SWEEP, *more)
    if answer == "ran" and not more:
        found = {name: each for name, each in results(folder).items() if name in wanted}
        if found != wanted:
            raise Fault(f"another result after damage to {harmed.relative_to(folder)}")
    return answer
