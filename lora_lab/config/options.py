"""The groups of conf/, their options, and a line on each option."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lora_lab.config.folders import config_folders


def options() -> dict[str, dict[str, str]]:
    """Group → option → the first comment of its YAML, as {"adapter": {"dora": "…"}}.

    Of all folders of configs: a project's and plugins' options are among lora_lab's own. Not to be
    changed by callers.
    """
    return _options_in(config_folders())


@cache
def _options_in(folders: tuple[Path, ...]) -> dict[str, dict[str, str]]:
    """The options in these folders: read once, as each point of a multirun asks for them."""
    merged: dict[str, dict[str, str]] = {}
    for folder in reversed(folders):  # an earlier folder's option stands in a later one's place
        for group, choices in _groups(folder, ""):
            merged[group] = merged.get(group, {}) | choices
    return {group: dict(sorted(merged[group].items())) for group in sorted(merged)}


def option_text(group: str, option: str) -> str:
    """The YAML of an option, with its comments."""
    files = (folder.joinpath(group, f"{option}.yaml") for folder in config_folders())
    return next(file for file in files if file.exists()).read_text()


def _groups(folder: Path, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Each group below a folder of conf/ with its options; `prefix` is its path, as "hydra/"."""
    for group in sorted(folder.iterdir(), key=lambda group: group.name):
        if group.is_dir() and not group.name.startswith("_"):
            choices = {
                option.name.removesuffix(".yaml"): _first_comment(option.read_text())
                for option in sorted(group.iterdir(), key=lambda option: option.name)
                if option.name.endswith(".yaml")
            }
            if choices:
                yield prefix + group.name, choices
            yield from _groups(group, f"{prefix}{group.name}/")


def _first_comment(text: str) -> str:
    """The first comment of a YAML file that is not Hydra's `# @package` line."""
    comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")
