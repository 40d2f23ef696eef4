"""What conf/ offers: every group, its options, and the first line each says of itself."""

from collections.abc import Iterator
from importlib.abc import Traversable
from importlib.resources import files


def options() -> dict[str, dict[str, str]]:
    """Group → option → its YAML's first comment."""
    return dict(_groups(files("lora_lab.conf"), ""))


def _groups(folder: Traversable, within: str) -> Iterator[tuple[str, dict[str, str]]]:
    for group in sorted(folder.iterdir(), key=lambda group: group.name):
        if group.is_dir() and not group.name.startswith("_"):
            found = {
                option.name.removesuffix(".yaml"): _first_comment(option.read_text())
                for option in sorted(group.iterdir(), key=lambda option: option.name)
                if option.name.endswith(".yaml")
            }
            if found:
                yield within + group.name, found
            yield from _groups(group, f"{within}{group.name}/")


def _first_comment(text: str) -> str:
    comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")
