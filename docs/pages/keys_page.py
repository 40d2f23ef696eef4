"""reference/keys.md: each key of a config, with its type, default and meaning."""

from docs.pages.tables import code, table
from lora_lab.config.key_meanings import Key, all_keys

ABOUT = """\
# Config keys

Made from `lora_lab/config/` and `conf/` when these pages are built. `lora-lab train KEY=VALUE` sets
a key. A default is what `conf/` has; the experiment you choose may set another one
(`experiment=shift` if you choose none), and `lora-lab train experiment=NAME --help` shows which.
`null` is "none", `???` must be given, and `NAME` stands for a name that you give.

Keys of `data`, `model` and `forget` are arguments of what the option names. They stand with their
options: [Options of each group](options.md).
"""

SECTIONS = {
    "": "A run",
    "adapter": "The adapter",
    "target": "Targets",
    "optimizer": "The optimizer",
    "base": "The base",
    "trainer": "The trainer",
    "spectra": "Spectra",
    "generate": "Generated texts",
    "early_stopping": "Early stopping",
    "tracking": "Tracking",
    "sweep": "Multiruns",
    "published": "Published numbers",
    "data": "Data",
    "model": "The model",
    "forget": "Forgetting",
}
"""First part of a key → the title of its section; others have launchers' keys."""

NOTES = {
    "trainer": "Any other argument of [Lightning's Trainer]"
    "(https://lightning.ai/docs/pytorch/stable/common/trainer.html) can be set too, as "
    "`trainer.limit_train_batches=5`.\n",
    "target": "`target=linear`, `target=[linear,conv]` and `target='*.fc*'` are short forms; a key "
    "of one target is `target.linear.match='body.*'`.\n",
}
"""What is said above a section's table."""


def keys_by_section() -> dict[str, dict[str, Key]]:
    """Section → key → the first that is known of it; keys of one option alone are left out."""
    sections: dict[str, dict[str, Key]] = {name: {} for name in SECTIONS}
    for key in sorted(all_keys(), key=lambda key: key.option not in DEFAULTS):
        name = (
            key.name.replace(key.option.partition("=")[2], "NAME") if _is_target(key) else key.name
        )
        first = name.split(".")[0] if "." in name or name in SECTIONS else ""
        is_general = not key.target or first in ("optimizer", "base")
        if first in sections and is_general:
            sections[first].setdefault(name, key)
    return sections


DEFAULTS = ("", "adapter=lora", "base=train", "tracking=offline", "trainer=auto", "optimizer=adam")
"""The options whose defaults are shown."""


def _is_target(key: Key) -> bool:
    return key.option.startswith("target=")


def text() -> str:
    """The page."""
    parts = [ABOUT]
    for section, keys in keys_by_section().items():
        rows = [[code(n), key.type, code(key.default), key.meaning] for n, key in keys.items()]
        parts.append(f"\n## {SECTIONS[section]}\n\n{NOTES.get(section, '')}\n")
        parts.append(table(["key", "type", "default", "meaning"], rows))
    return "".join(parts)
