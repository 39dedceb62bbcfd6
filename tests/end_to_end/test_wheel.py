"""The installed wheel runs outside the checkout: it contains the config."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend of this environment (no network)."""
    pytest.importorskip("hatchling", reason="needs the build backend: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run([sys.executable, "-m", *map(str, build)], check=True)
    (file,) = folder.glob("stagesweep-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked in it, as pip installs it."""
    folder = tmp_path_factory.mktemp("installed")
    install = ["pip", "install", str(wheel), "--no-deps", "-q", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", *install], check=True)
    return folder


def test_the_wheel_carries_every_yaml_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    yaml = {f"stagesweep/conf/{p.relative_to(CONF).as_posix()}" for p in CONF.rglob("*.yaml")}
    assert yaml <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stagesweep"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def command(installed: Path, cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """The installed command, in a folder outside the checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    script = installed / "bin" / "stagesweep"
    process = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment | {"STAGESWEEP_STORE": str(cwd / "store")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process


def test_the_installed_command_finds_its_own_config(installed: Path, tmp_path: Path) -> None:
    path = command(installed, tmp_path, "--info", "searchpath").stdout
    assert str(installed / "stagesweep" / "conf") in path
    assert str(CONF) not in path
    assert "digits" in command(installed, tmp_path, "--help").stdout
    assert "experiment:" in command(installed, tmp_path, "--cfg", "job").stdout


def test_the_installed_command_runs(installed: Path, tmp_path: Path) -> None:
    tiny = (f"--config-dir={ROOT / 'tests' / 'conf'}", "experiment=tiny", "hydra.run.dir=run")
    command(installed, tmp_path, *tiny)
    assert '"status": "complete"' in (tmp_path / "run" / "result.json").read_text()
