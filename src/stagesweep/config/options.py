"""Lists the options of each config group, for ``--help``."""

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config.messages import missing_option


def folders() -> list[Path]:
    """The config folders of this command: stagesweep's own, then those that the user added."""
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file"]


def check_optional_groups() -> None:
    """Raise UserError for an unknown option of search/space or search/ablation.

    Hydra takes these groups as optional. Only the name of the experiment may have no file.
    """
    runtime = HydraConfig.get().runtime
    choices: Any = OmegaConf.to_container(runtime.choices)
    for group in ("search/space", "search/ablation"):
        option = choices.get(group)
        if option == choices.get("experiment") or not isinstance(option, str):
            continue
        if any(
            source.schema == "pkg" and source.provider not in ("hydra", "schema")
            for source in runtime.config_sources
        ):
            continue  # the option may lie in a package
        roots = [folder / group for folder in folders()]
        if not any((root / f"{option.removesuffix('.yaml')}.yaml").is_file() for root in roots):
            known = {file.stem for root in roots for file in root.glob("*.yaml")}
            raise UserError(missing_option(f"{group}/{option}", sorted(known)))


def groups() -> str:
    """One line for each config group: its name and its options."""
    found: dict[str, set[str]] = {}
    for folder in folders():
        for file in folder.rglob("*.yaml"):
            group = file.parent.relative_to(folder).as_posix()
            if group.partition("/")[0] not in (".", "hydra", "experiment"):
                found.setdefault(group, set()).add(file.stem)
    return _table((group, ", ".join(sorted(found[group]))) for group in sorted(found))


def experiments() -> str:
    """One line for each experiment: its name and the first sentence of its YAML's header."""
    roots = [folder / "experiment" for folder in folders()]
    files = [(root, file) for root in roots for file in sorted(root.rglob("*.yaml"))]
    return _table(
        (file.relative_to(root).with_suffix("").as_posix(), summary(file)) for root, file in files
    )


def summary(file: Path) -> str:
    """The first sentence of a YAML file's header, without Hydra's package directive."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    text = (line.lstrip("# ") for line in lines if "@package" not in line)
    return shorten(" ".join(text).partition(". ")[0], width=88, placeholder=" …")


def _table(rows: Iterable[tuple[str, str]]) -> str:
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    # The help text is a string.Template, in which $$ is a dollar sign.
    return "\n".join(f"  {name:<{width}}  {text}".replace("$", "$$") for name, text in pairs)
