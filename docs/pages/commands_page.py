"""reference/commands.md: what `lora-lab COMMAND --help` says, of each command."""

import contextlib
import io
import os
import re
import sys

from lora_lab.cli.main import main

ABOUT = """\
# Commands

Made from the commands themselves when these pages are built: each block is what `--help` prints.
"""


def text() -> str:
    """The page."""
    overview = help_of()
    parts = [ABOUT, f"\n## lora-lab\n\n```\n{overview}```\n"]
    for command in commands(overview):
        parts.append(f"\n## {command}\n\n```\n{help_of(command)}```\n")
    return "".join(parts)


def commands(overview: str) -> list[str]:
    """The names of the commands, in the order of `lora-lab --help`."""
    listed = overview.partition("COMMAND\n")[2].partition("\noptions:")[0]
    return re.findall(r"^    (\w+)\b", listed, re.MULTILINE)


def help_of(*command: str) -> str:
    """What `lora-lab COMMAND --help` prints, 100 characters wide."""
    printed, argv, width = io.StringIO(), sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["lora-lab", *command, "--help"], "100"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main()
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
    return printed.getvalue()
