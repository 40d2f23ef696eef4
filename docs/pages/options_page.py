"""reference/options.md: the options of each group of conf/, and the keys that each one sets."""

import re

from docs.pages.tables import code, escaped, table
from lora_lab.config.key_meanings import keys_of, parents_of
from lora_lab.config.options import option_text, options

ABOUT = """\
# Options of each group

Made from `conf/` when these pages are built. `lora-lab train GROUP=OPTION` chooses an option, and
`lora-lab train GROUP=OPTION --help` shows its file. A project's own options stand beside these
([Your own model and data](../tutorials/own-project.md)).
"""


def text() -> str:
    """The page: a table of options for each group, then each option's keys."""
    parts = [ABOUT]
    for group, choices in options().items():
        name = group.replace("/", ".")
        parts.append(f"\n## {group}\n\n")
        rows = [f"| [`{o}`](#{name}-{o}) | {escaped(said)} |\n" for o, said in choices.items()]
        parts += [table([f"{group}=", "what it is"], []), *rows]
        parts += [_option(group, option, said) for option, said in choices.items()]
    return "".join(parts)


def _option(group: str, option: str, said: str) -> str:
    """An option's heading, its comments, the options it begins from, and its keys."""
    parents = "".join(
        f"It begins from [`{group}={parent}`](#{group.replace('/', '.')}-{parent}), and sets:\n\n"
        for parent in parents_of(group, option)
    )
    title = f"\n### {group}={option} {{ #{group.replace('/', '.')}-{option} }}\n\n"
    if group == "experiment":
        return f"{title}{_comments(group, option)}\n```yaml\n{_content(group, option)}```\n"
    rows = [[code(k.name), k.type, code(k.default), k.meaning] for k in keys_of(group, option)]
    keys = table(["key", "type", "default", "meaning"], rows) if rows else ""
    return f"{title}{_comments(group, option)}\n{parents}{keys}"


def _comments(group: str, option: str) -> str:
    """The comments at the head of an option's file; its commands are kept as they are."""
    lines = []
    for line in option_text(group, option).splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    prose = [line for line in lines if not line.startswith("  ")]
    commands = [line.strip() for line in lines if line.startswith("  ")]
    block = "\n```\n" + "\n".join(commands) + "\n```\n" if commands else ""
    return escaped(" ".join(prose)) + "\n" + block


def _content(group: str, option: str) -> str:
    """An option's YAML below its first comments."""
    return re.sub(r"\A(#.*\n)+", "", option_text(group, option))
