"""The groups of conf/, their options, and a line on each option."""

from collections.abc import Iterator
from functools import cache
from importlib.abc import Traversable
from importlib.resources import files


@cache
def options() -> dict[str, dict[str, str]]:
    """Group → option → the first comment of its YAML, as {"adapter": {"dora": "…"}}.

    Read once, as each point of a multirun asks for it. Not to be changed by callers.
    """
    return dict(_groups(files("lora_lab.conf"), ""))


def option_text(group: str, option: str) -> str:
    """The YAML of an option, with its comments."""
    return files("lora_lab.conf").joinpath(*group.split("/"), f"{option}.yaml").read_text()


def _groups(folder: Traversable, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
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
