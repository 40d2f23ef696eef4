"""Messages on targets that pick nothing, and on weights that take no adapter."""

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape

from torch import nn

from lora_lab.adapters.globs import as_list, matching
from lora_lab.adapters.sites import ADAPTERS, Site
from lora_lab.adapters.target import SitesByName, Target


def reason_none_picked(label: str, target: Target, model: nn.Module, sites: SitesByName) -> str:
    """Why a target picks no site, with the nearest names."""
    globs = list(as_list(target.match))
    noun = "weight" if target.kind in ("all", "weight") else f"{target.kind} weight"
    of_kind = replace(target, match="*", exclude=()).pick(sites)
    if not of_kind:
        return f"target '{label}' picks nothing: the model has no {noun}"
    if replace(target, exclude=()).pick(sites):
        return f"target '{label}' picks nothing: its exclude leaves out all that its match picks"
    if of_other_kinds := [sites.sites[i] for i in sorted(sites.fitting(globs))]:
        shown = ", ".join(f"{site.name} ({site.kind})" for site in of_other_kinds[:3])
        return f"target '{label}' picks no {noun}, only {shown}"
    modules = {name: module for name, module in model.named_modules() if name}
    named = matching(globs, modules)
    modules = {name: module for name, module in modules.items() if name in named}
    if modules and globs != ["*"]:
        shown = ", ".join(f"{n} ({type(m).__name__})" for n, m in list(modules.items())[:3])
        holder = next((n for n in modules if any(s.name.startswith(f"{n}.") for s in of_kind)), "")
        way = f"; '{escape(holder)}.*' picks those within" if holder else ""
        return f"target '{label}' picks no {noun}, only {shown}{way}"
    shown = ", ".join(f"'{glob}'" for glob in globs)
    last_names = [*dict.fromkeys(site.name.rpartition(".")[2] for site in of_kind)]
    few = ", ".join(last_names[:6]) + (", …" if last_names[6:] else "")
    subject = "" if globs == [label] else f": {shown} fits none"
    brackets = "; '[' begins a set of letters: write '[[]' for it" * ("[" in "".join(globs))
    return (
        f"target '{label}' picks no {noun}{subject}; nearest names: "
        f"{nearest(globs[0], of_kind)}; last names of its {noun}s: {few}{brackets}"
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


def reason_no_dora(
    sites: Sequence[Site], targets: Mapping[str, Target], label_by_site: Mapping[str, str]
) -> str:
    """Names the picked sites that can have no DoRA, and the settings that leave them out."""
    kinds = ", ".join(dict.fromkeys(site.kind for site in sites))
    able = ", ".join(dict.fromkeys(A.kind for A in ADAPTERS if A.takes_dora))
    ways = ["dora=false"]
    for label in dict.fromkeys(label_by_site[site.name] for site in sites):
        of_label = [site for site in sites if label_by_site[site.name] == label]
        if len(of_label) == list(label_by_site.values()).count(label):
            ways.append(f"leave out the target '{label}'")
            continue
        # All sites of a layer at once, by its name; the model itself has none.
        names = dict.fromkeys(site.layer or site.name for site in of_label)
        globs = [*as_list(targets[label].exclude), *names]
        ways += [" ".join(_setting(label, targets[label], "exclude", globs))]
    names, verb = _shown([site.name for site in sites]), "is" if len(sites) == 1 else "are"
    return (
        f"dora=true: {names} {verb} of kind {kinds}, and DoRA is for {able}: {', or '.join(ways)}"
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


def in_one(messages: Sequence[tuple[Site, str]]) -> str:
    """The messages of many sites as one, in which those that are alike name their sites together.

    Of "'a' cannot be adapted: X" and the same of 'b': "'a', 'b' cannot be adapted: X".
    """
    names_by_text: dict[str, list[str]] = {}
    for site, message in messages:
        names_by_text.setdefault(message.replace(f"'{site.name}'", "\0"), []).append(site.name)
    return "; ".join(text.replace("\0", _shown(names)) for text, names in names_by_text.items())


def _shown(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"'{name}'" for name in names[:most]) + more
