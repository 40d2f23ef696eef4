"""What conf/ offers: every group, its options, and the first line each says of itself."""

from importlib.resources import files


def options() -> dict[str, dict[str, str]]:
    """Group → option → its YAML's first comment."""
    return {
        group.name: {
            option.name.removesuffix(".yaml"): _first_comment(option.read_text())
            for option in sorted(group.iterdir(), key=lambda option: option.name)
            if option.name.endswith(".yaml")
        }
        for group in sorted(files("lora_lab.conf").iterdir(), key=lambda group: group.name)
        if group.is_dir() and not group.name.startswith("_")
    }


def _first_comment(text: str) -> str:
    comments = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")
