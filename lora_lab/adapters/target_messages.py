"""Messages on targets that pick nothing, and on weights that take no adapter."""

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from lora_lab.adapters.sites import Site
from lora_lab.adapters.target import Target, as_list, fits


def reason_none_picked(label: str, target: Target, model: nn.Module, sites: Sequence[Site]) -> str:
    """Why a target picks no site, with the nearest names."""
    globs = list(as_list(target.match))
    noun = "weight" if target.kind in ("all", "weight") else f"{target.kind} weight"
    of_kind = [site for site in sites if replace(target, match="*", exclude=()).picks(site)]
    if not of_kind:
        return f"target '{label}' picks nothing: the model has no {noun}"
    if any(fits(site, globs) for site in of_kind):
        return f"target '{label}' picks nothing: its exclude leaves out all that its match picks"
    of_other_kinds = [site for site in sites if fits(site, globs)]
    if of_other_kinds:
        shown = ", ".join(f"{site.name} ({site.kind})" for site in of_other_kinds[:3])
        return f"target '{label}' picks no {noun}, only {shown}"
    layers = {n: m for n, m in model.named_modules() if n and any(fnmatchcase(n, g) for g in globs)}
    if layers and globs != ["*"]:
        shown = ", ".join(f"{n} ({type(m).__name__})" for n, m in list(layers.items())[:3])
        return f"target '{label}' picks no {noun}, only {shown}"
    shown = ", ".join(f"'{glob}'" for glob in globs)
    last_names = [*dict.fromkeys(site.name.rpartition(".")[2] for site in of_kind)]
    few = ", ".join(last_names[:6]) + (", …" if last_names[6:] else "")
    subject = "" if globs == [label] else f": {shown} fits none"
    return (
        f"target '{label}' picks no {noun}{subject}; nearest names: "
        f"{nearest(globs[0], of_kind)}; last names of its {noun}s: {few}"
    )


def nearest(glob: str, sites: Iterable[Site]) -> str:
    """The names of sites that are most like a glob."""
    names = [site.name for site in sites]
    return ", ".join(difflib.get_close_matches(glob, names, n=3, cutoff=0.0))


def reason_tied(
    tied: Sequence[tuple[Site, list[str]]],
    targets: Mapping[str, Target],
    label_by_site: Mapping[str, str],
    is_left_out: bool = False,
) -> str:
    """Names the picked sites that are `tied` (with all names of each weight), and the way out.

    `is_left_out`: they are left out already, so that this is no way.
    """
    weights = "; ".join(f"'{site.name}' is tied ({' = '.join(names)})" for site, names in tied)
    labels = [label_by_site[site.name] for site, _ in tied]
    exclude, adapt_once = [], []
    for label in dict.fromkeys(labels):
        names = [site.name for site, _ in tied if label_by_site[site.name] == label]
        picks_others = len(names) < list(label_by_site.values()).count(label)
        if picks_others and not is_left_out:
            globs = [*as_list(targets[label].exclude), *names]
            exclude += _setting(label, targets[label], "exclude", globs)
        adapt_once += _setting(label, targets[label], "tied", ["true"])
    ways = [f"{' '.join(adapt_once)} adapts it once for all of them"]
    if exclude:
        ways.insert(0, f"{' '.join(exclude)} leaves it out")
    return (
        f"the weight of {weights}: an adapter would change one use of it and not the other; "
        f"{', '.join(ways)}"
    )


def _setting(label: str, target: Target, key: str, values: Sequence[str]) -> list[str]:
    """What sets a target's `key`, as it is written on a command line.

    A target that is only a glob has the glob as its label, with which no key can be written: it
    gets a label first.
    """
    before = []
    if not label.isidentifier():
        before = ["target=all", f"target.all.match={_list(as_list(target.match))}"]
        label = "all"
    return [shlex.quote(word) for word in (*before, f"target.{label}.{key}={_list(values)}")]


def _list(values: Sequence[str]) -> str:
    """One value, or several in brackets."""
    return values[0] if len(values) == 1 else f"[{','.join(values)}]"


def in_one(messages: Sequence[tuple[Site, str]], shown: int = 3) -> str:
    """The messages of many sites as one, in which those that are alike name their sites together.

    Of "'a' cannot be adapted: X" and the same of 'b': "'a', 'b' cannot be adapted: X".
    """
    names_by_text: dict[str, list[str]] = {}
    for site, message in messages:
        names_by_text.setdefault(message.replace(f"'{site.name}'", "{}"), []).append(site.name)
    texts = []
    for text, names in names_by_text.items():
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        texts.append(text.replace("{}", ", ".join(f"'{name}'" for name in names[:shown]) + more))
    return "; ".join(texts)
