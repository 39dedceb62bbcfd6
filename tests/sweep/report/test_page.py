"""The report: its content, its safety as a single file, and its look."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.request import urlopen

import pytest
import yaml

from stagesweep.sweep.report import charts, svg
from stagesweep.sweep.report import importances as importances_module
from stagesweep.sweep.report import page as report
from stagesweep.sweep.report.comparison import comparisons
from stagesweep.sweep.report.loading import read

Make = Callable[..., Any]

HOSTILE = "<script>alert('x')</script> & \"$\\frac{1}{2}$\" --> <b>"


class Page(HTMLParser):
    """The content of a report: tables by heading, links, scripts, text."""

    VOID = frozenset({"meta", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.links: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.heading = ""
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "no handlers in attributes"
            if name in ("href", "xlink:href") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("h1", "h2"):
            self.heading = ""
        if tag == "table":
            self.tables[self.heading] = []
        elif tag == "tr":
            self.tables[self.heading].append([])
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if {"h1", "h2"} & set(self.open):
            self.heading += data.strip()
        if {"td", "th"} & set(self.open):
            cells = self.tables[self.heading][-1]
            cells[-1] = re.sub(r"[ \n]+", " ", cells[-1] + data).strip()


def shown(*folders: Path) -> Page:
    """The report of some sweeps, beside the first of them."""
    output = folders[0] / "report.html"
    assert report.main([*map(str, folders), "--output", str(output), "--open", "no"]) == 0
    text = output.read_text()
    page = Page(text)
    for link in page.links:
        assert not re.match(r"\w+:|//", link), "nothing leads off the disk"
        target = (
            link[1:] in page.ids if link[0] == "#" else (output.parent / unquote(link)).exists()
        )
        assert target, link
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe", "object", "image"} & set(page.tags)
    assert "@import" not in text
    assert "url(http" not in text
    return page


def full(make: Make, name: str = "study", count: int = 12) -> Path:
    """A sweep with everything: all states, curves, a stage that is shared, reports."""
    maker = make(name)
    for number in range(count):
        one = {"name": "pretrain", "fingerprint": "a" * 32, "metrics": {}}
        two = {"name": "joint", "fingerprint": f"{number:032x}", "metrics": {}}
        stages = [
            {**one, "status": "reused" if number else "ran", "seconds": 1 if number else 61},
            {**two, "status": "ran", "seconds": 20},
        ]
        value = 0.5 + 0.04 * number * (-1) ** number
        maker.trial(
            {"joint.lr": 0.0001 * (number + 1), "part": "ab"[number % 2]},
            [value],
            reports={1: value / 2, 2: value},
            stages=stages,
            curves={
                "pretrain": [{"val_loss": 2.0}, {"val_loss": 1.0}],
                "joint": [{"val_loss": 2 - value, "nmi": value / 2}, {"val_loss": 1, "nmi": value}],
            },
        )
    maker.trial({"joint.lr": 0.5, "part": "a"}, None, "failed", reason="oom", message="no memory")
    maker.trial({"joint.lr": 0.6, "part": "b"}, [0.1], "pruned", reports={1: 0.125})
    maker.trial({"joint.lr": 0.7, "part": "b"}, None, "running")
    return maker.folder


def test_the_facts_of_a_sweep(make: Make) -> None:
    page = shown(full(make))
    assert "tiny · study" in page.text
    assert "stagesweep -m experiment=tiny '~stage.figures'" in page.text
    assert "best evaluate/nmi (largest) 0.9 trial 10" in page.text
    assert "15 12 complete , 1 pruned , 1 failed , 1 running" in page.text
    assert "saved by reuse 11 min 00 s 11 stages taken from the store" in page.text
    assert "1 running; the last update was" in page.text
    head, *rows = page.tables["Leaderboard"]
    first = ["rank", "trial", "state", "evaluate/nmi", "time", "reused", "joint.lr", "part"]
    assert head == first
    assert len(rows) == 14
    assert rows[0] == ["1", "10", "complete", "0.9", "30.0 s", "1", "0.0011", "a"]
    assert [row[1] for row in rows[:3]] == ["10", "8", "6"]
    assert rows[12][:4] == ["", "13", "pruned", "0.125 at 1"]
    assert rows[13][:4] == ["", "14", "running", "—"]
    assert page.tables["Failed trials"][1][:3] == ["12", "oom", "no memory"]
    assert "12/run.log" in page.links
    for heading in ("History", "Parameters", "Learning curves"):
        assert heading in page.words
    assert "shared by all trials" in page.text
    assert "joint/nmi" in page.text  # the curve of the objective's own name
    assert "reported value" in page.text
    assert "Pareto" not in page.text
    assert page.tags.count("svg") == 1 + 1 + 1 + 2 + 3


def test_malicious_strings_are_escaped(make: Make) -> None:
    maker = make("<b>study", objectives=[HOSTILE])
    for number in range(11):
        params = {HOSTILE: 0.1 * (number + 1), "part": HOSTILE}
        maker.trial(params, [number + 0.5], curves={HOSTILE: [{"val_loss": 1.0}]})
    maker.trial(params, None, "failed", reason=HOSTILE, message=f"{HOSTILE}\n{HOSTILE}")
    maker.trial({**params, "ablation": HOSTILE}, [1.0], repeats=[0.5, 1.5])
    page = shown(maker.folder)
    assert page.tables["Leaderboard"][1][3].replace(" ", "") == "10.5"
    assert "b" not in page.tags[page.tags.index("article") :][:12]
    assert page.tables["Failed trials"][1][1] == HOSTILE
    assert HOSTILE.replace("\\", "") in page.text.replace("\\", "")


def test_importances_need_trials(make: Make) -> None:
    maker = make()
    for number in range(3):
        maker.trial({"lr": 0.1 * (number + 1)}, [number])
    assert "Importances need more trials: 3 of at least 10" in shown(maker.folder).text


def test_many_trials_have_their_importances_by_another_method(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importances_module, "MANY", 10)
    maker = make()
    for number in range(12):
        maker.trial({"lr": 0.01 * (number + 1), "other": 1.0}, [float(number)])
    assert "explains (mean decrease of impurity), from 12 trials" in shown(maker.folder).text


def test_an_objective_that_never_varies(make: Make) -> None:
    maker = make()
    for number in range(12):
        maker.trial({"lr": 0.1 * (number + 1)}, [1.0])
    assert "evaluate/nmi is the same in all trials" in shown(maker.folder).text


def test_values_that_cannot_be_drawn(make: Make) -> None:
    maker = make()
    for number, value in enumerate((float("inf"), 1.0, float("-inf"), 1e300, 1e-300)):
        curve = [{"val_loss": None}, {"val_loss": value}]
        maker.trial({"lr": 0.1 * (number + 1)}, [value], curves={"joint": curve})
    assert len(shown(maker.folder).tables["Leaderboard"]) == 6


def test_an_ablation_table(make: Make) -> None:
    maker = make()
    maker.trial({"ablation": "full"}, [0.8], repeats=[0.75, 0.8, 0.85])
    maker.trial({"ablation": "a"}, [0.7], repeats=[0.65, 0.7, 0.75])
    maker.trial({"ablation": "b"}, [0.8], repeats=[0.8, 0.75, 0.85])
    page = shown(maker.folder)
    head, *rows = page.tables["Ablation"]
    assert head[0] == "variant"
    assert rows[0] == ["full", "3", "0.8", "0.676 … 0.924", "—", "—"]
    assert rows[2] == ["a", "3", "0.7", "0.576 … 0.824", "-0.1", "-0.1 … -0.1"]
    assert rows[1][4] == "+0"
    assert "0.8± 0.12" in page.tables["Leaderboard"][1][3]
    assert "95 % interval 0.676 … 0.924" in page.text


def test_an_ablation_compares_other_metrics_too(make: Make) -> None:
    maker = make()
    scores = {"full": [0.2, 0.4], "a": [0.1, None], "b": [0.5, 0.7]}
    for number, (name, values) in enumerate(scores.items()):
        folder = maker.trial({"ablation": name}, [0.9 - number / 10], repeats=[0.9, 0.8])
        for run, value in enumerate(values):
            result = {"status": "complete", "metrics": {"evaluate/ari": value}}
            (folder / str(run) / "result.json").write_text(json.dumps(result))
            config = {"search": {"ablation": {"metrics": ["evaluate/ari"]}}}
            (folder / str(run) / "config.yaml").write_text(yaml.safe_dump(config))
    found = comparisons(read(maker.folder))
    assert list(found) == ["objective", "evaluate/ari"]
    full, a, b = found["evaluate/ari"].points
    assert [point.name for point in (full, a, b)] == ["full", "a", "b"], "in order of the objective"
    assert b.minus(full).mean == pytest.approx(0.3)
    assert a.minus(full).mean == pytest.approx(-0.1), "of the runs that have both"
    page = shown(maker.folder)
    assert page.text.count("Each variant beside the full model") == 2
    assert "evaluate/ari" in page.text


def test_repeats_without_an_ablation(make: Make) -> None:
    maker = make()
    maker.trial({"lr": 0.1}, [0.7], repeats=[0.65, 0.75])
    maker.trial({"lr": 0.2}, [0.8], repeats=[0.75, 0.85])
    page = shown(maker.folder)
    assert page.tables["Repeats"][0][0] == "point"
    assert page.tables["Repeats"][1][0] == "lr=0.2"
    assert "so they favour it" in page.text


def test_seeds_show_how_methods_compare(make: Make) -> None:
    maker = make()
    for seed, score in enumerate((0.7, 0.9), 1):
        artifacts = (
            maker.trial({"seed": float(seed)}, [score]) / "stages" / "1_evaluate" / "artifacts"
        )
        artifacts.mkdir(parents=True)
        lines = "method,split,acc,stability", f"model,train,{score},1", "kmeans,train,0.5,"
        (artifacts / "comparison.csv").write_text("\n".join(lines))
    page = shown(maker.folder)
    head, model, kmeans = page.tables["Methods"]
    assert head == ["method", "split", "acc"]
    assert model == ["model", "train", "0.800± 1.271"]
    assert kmeans == ["kmeans", "train", "0.500± 0.000"]
    assert page.tables["Repeats"][0] == ["point", "runs", "evaluate/nmi", "95 % interval"]


def test_several_objectives_have_a_front(make: Make) -> None:
    names = ["evaluate/nmi", "evaluate/size", "evaluate/time"]
    maker = make(directions=["maximize", "minimize", "minimize"], objectives=names)
    for number in range(6):
        maker.trial({"lr": 0.1 * (number + 1)}, [number, number * 2.0, 1.0 + number % 2])
    maker.trial({"lr": 1.0}, [0.0, 100.0, 9.0])
    page = shown(maker.folder)
    assert "The front has 6 of 7 complete trials." in page.text
    assert "best evaluate/size (smallest)" in page.text
    assert page.tags.count("svg") == 3 + 3 + 3


def test_several_sweeps_side_by_side(make: Make) -> None:
    page = shown(full(make, "one"), full(make, "two", 6))
    assert "2 sweeps side by side" in page.text
    rows = page.tables["2 sweeps side by side"][1:]
    assert [row[0] for row in rows] == ["tiny · one", "tiny · two"]
    assert [row[2] for row in rows] == ["0.9", "0.66"]
    assert "Best so far" in page.text
    assert "../two/4/" in page.links


def test_a_sweep_that_has_only_begun(make: Make) -> None:
    maker = make()
    assert "No trial has started yet." in shown(maker.folder).text
    maker.trial({"lr": 0.1}, None, "running")
    assert shown(maker.folder).tables["Leaderboard"][1][2] == "running"


def test_a_large_sweep_is_cut(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROWS", 3)
    page = shown(full(make, count=6))
    assert len(page.tables["Leaderboard"]) == 1 + 3
    assert "The first 3 trials; results_summary.csv has all." in page.text


FAULTS = {
    "nowhere": "no folder ",
    "empty": "no study in ",
    "file": "no folder ",
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_folder_without_a_sweep_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert report.main([str(tmp_path / case), "--open", "no"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"stagesweep-report: {FAULTS[case]}")
    assert said.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))


def test_where_it_is_written(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = full(make, "one", 2), full(make, "two", 2)
    monkeypatch.chdir(one.parent)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert report.main(["one"]) == 0
    assert report.main(["one", "two", "--open", "yes"]) == 0
    assert capsys.readouterr().out.split() == ["one/report.html", "report.html"]
    assert (one / "report.html").exists()
    assert opened == [(two.parent / "report.html").as_uri()]


def test_the_end_of_a_sweep_survives_its_report(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = full(make, count=2)
    report.write_or_warn(folder)
    assert (folder / "report.html").exists()
    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)
    report.write_or_warn(folder)
    assert "no report.html: division by zero; try: stagesweep-report" in caplog.text


def test_charts_have_the_colours_of_the_page(make: Make) -> None:
    folder = full(make)
    drawn = charts.history(read(folder), 0, lambda trial: f"{trial.number}/")
    assert "var(--best)" in drawn
    assert set(re.findall(r"var\(--(.*?)\)", drawn)) <= set(svg._NAMES.values())
    assert not set(re.findall(r"#[0-9a-f]{6}\b", drawn)) - {"#ffffff"}
    style = (report.HERE / "report.css").read_text()
    for name in svg._NAMES.values():
        assert style.count(f"--{name}:") == 2, "for light and for dark"


# ------------------------------------------------------------------------------ in a browser


@pytest.mark.parametrize("size", ["1280,2400", "500,2400"])
def test_chromium_draws_it(make: Make, tmp_path: Path, size: str) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    folder = full(make)
    shown(folder)
    picture = tmp_path / "report.png"
    common = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    own = [f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={size}"]
    url = (folder / "report.html").as_uri()
    said = subprocess.run(
        [*common, *own, "--enable-logging=stderr", f"--screenshot={picture}", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in said.stderr  # no error in the script, nothing blocked
    assert picture.stat().st_size > 20_000
    dom = subprocess.run(
        [*common, *own, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    )
    assert 'data-ready="true"' in dom.stdout  # the page's own policy allows the script


# ------------------------------------------------------------------------------ other programs


def test_optuna_dashboard_shows_the_study(make: Make) -> None:
    pytest.importorskip("optuna_dashboard", reason="needs optuna-dashboard")
    folder = full(make)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from optuna_dashboard._cli import main; main()"
    where = ["--host", "127.0.0.1", "--port", str(port), f"sqlite:///{folder / 'study.db'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", start, *where], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    def get(page: str) -> str:
        with urlopen(f"http://127.0.0.1:{port}/{page}", timeout=60) as answer:
            return str(answer.read().decode())

    try:
        until = time.monotonic() + 120
        while True:
            try:
                page = get("dashboard")
                break
            except OSError:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < until
                time.sleep(0.1)
        assert "Optuna Dashboard" in page
        (study,) = json.loads(get("api/studies"))["study_summaries"]
        assert study["study_name"] == "study"
        trials = json.loads(get(f"api/studies/{study['study_id']}"))["trials"]
        assert [trial["number"] for trial in trials] == list(range(len(read(folder).trials)))
    finally:
        process.kill()
        process.communicate()
