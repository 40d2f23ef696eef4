"""Which code a run was trained with, and whether that is still the same."""

import ast
import hashlib
import json
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec, resolve_name
from pathlib import Path

from lora_lab.config.schema import Component, Config, ConfigError
from lora_lab.config.trust import LIBRARIES, components_of
from lora_lab.data import Data
from lora_lab.runs import Run
from lora_lab.training.run_record import can_continue, package_versions

INSTALLED = tuple({Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")})
"""The folders of installed packages of this Python."""

INSTALLED_NAMES = ("site-packages", "dist-packages")
"""Names that folders of installed packages have, also another Python's that PYTHONPATH names."""

NUMERIC = ("lora_lab", "lightning", *LIBRARIES)
"""Packages in which a run's numbers are computed."""

HASH = "syntax "
"""What the hash of a module begins with; a package has its version in its place."""


def check_same_code(cfg: Config, run: Run) -> None:
    """Raises ConfigError where a run is finished or under way, and the code is another now.

    Runs of earlier versions have no record of their code: of them nothing is told.
    """
    status = run.status
    has_result = status["state"] == "finished" or can_continue(status)
    if not cfg.overwrite and has_result and (changes := code_changes(cfg, run)):
        raise ConfigError(
            f"the code has changed since {run.path} was trained ({changes}): overwrite=true "
            "trains it again, another runs_dir keeps both"
        )


def code_changes(cfg: Config, run: Run) -> str:
    """What differs from the code that a run was trained with, as `net.layers changed`."""
    before = run.status.get("code")
    if not isinstance(before, dict):
        return ""
    now = code_of(components_of(cfg).values())
    names = changed_names(before, now)
    return ", ".join(_change(name, before.get(name), now.get(name)) for name in names)


def changed_names(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The modules and packages that differ between two records of `code_of`, sorted."""
    return sorted(name for name in {**before, **now} if before.get(name) != now.get(name))


def _change(name: str, before: str | None, now: str | None) -> str:
    """What happened to a module or a package."""
    if before is None or now is None:
        return f"{name} is {'new' if before is None else 'gone'}"
    return f"{name} changed" if now.startswith(HASH) else f"{name} {before} is {now} now"


def other_versions(run: Run) -> str:
    """The libraries that a run was trained with in another version, as `torch 2.12 (here 2.13)`.

    One that is not installed here is left out: nothing of it is used.
    """
    try:
        before = json.loads((run.path / "env.json").read_text())["packages"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    pairs = {name: (before.get(name), now) for name, now in package_versions().items()}
    return ", ".join(
        f"{name} {before} (here {now})"
        for name, (before, now) in pairs.items()
        if name in NUMERIC and before and now and before != now
    )


def code_of(components: Collection[Component]) -> dict[str, str]:
    """The code that components are computed by: module → hash, package → version.

    It is that of each `_target_` and of the classes it derives from. A module of lora_lab or of the
    user's has the hash of its syntax, so that comments, docstrings and layout do not count, and
    with the user's are those that they import; so are the files beside the weights of a model with
    `remote_code`. An installed package has its version. Left out are
    torch, transformers and timm (env.json has their versions), and the contract of all data sets.
    """
    callees = [component.callee for component in components]
    classes = [c for callee in callees for c in getattr(callee, "__mro__", (callee,))]
    modules = sorted({c.__module__ for c in classes if c not in Data.__mro__})
    remote = [Path(c.arguments["path"]) for c in components if c.arguments.get("remote_code")]
    files = {f.relative_to(d).as_posix(): f for d in remote for f in sorted(d.rglob("*.py"))}
    return dict(_code_of(tuple(modules))) | {name: _syntax_hash(f) for name, f in files.items()}


@lru_cache(maxsize=64)
def _code_of(modules: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Pairs of (name, hash or version) of modules and of what they import of the user's.

    Kept for later calls: what a process has imported stays, whatever becomes of the file.
    """
    code, seen, pending = {}, set(modules), list(modules)
    while pending:
        module = pending.pop()
        package = module.partition(".")[0]
        if package in LIBRARIES or package in sys.stdlib_module_names:
            continue
        if _is_installed(package) and (names := packages_distributions().get(package)):
            code[package] = version(names[0])
        elif file := _source_file(module):
            code[module] = _syntax_hash(file)
            imported = set() if is_ours(module) else {*_imports(module, file)}
            new = {name for name in imported - seen if _is_users(name)}
            pending += new
            seen |= new
    return tuple(sorted(code.items()))


def is_ours(module: str) -> bool:
    """Whether a module is of lora_lab."""
    return module.partition(".")[0] == "lora_lab"


def _is_users(module: str) -> bool:
    package = module.partition(".")[0]
    is_known = is_ours(module) or package in sys.stdlib_module_names or _is_installed(package)
    return not is_known and _place(package) is not None


def _is_installed(package: str) -> bool:
    """Whether a package, other than lora_lab, lies in a folder of installed packages."""
    place = None if is_ours(package) else _place(package)
    others = [Path(entry).resolve() for entry in sys.path if Path(entry).name in INSTALLED_NAMES]
    return place is not None and any(map(place.is_relative_to, (*INSTALLED, *others)))


def _source_file(module: str) -> Path | None:
    """The Python file of a module; None for one that has none, and for what is no module."""
    place = _place(module)
    return place if place and place.suffix == ".py" else None


def _place(module: str) -> Path | None:
    """The file of a module, or the folder of a package without __init__.py."""
    try:
        spec = _spec(module)
    except (ImportError, ValueError, AttributeError):  # what no file holds, as __main__
        return None
    folders = (spec and spec.submodule_search_locations) or ()
    places = [*filter(None, (spec and spec.origin, *folders))]
    return Path(places[0]).resolve() if places else None


def _spec(module: str) -> ModuleSpec | None:
    """Where a module lies. Of `a.b` find_spec would import `a`: so b is looked for in a's folders.

    It is looked for by its last name, since a folder without __init__.py asks for its parent's
    module by the full one.
    """
    parent, _, name = module.rpartition(".")
    if not parent or module in sys.modules:
        return find_spec(module)
    above = _spec(parent)
    folders = [*(above.submodule_search_locations or ())] if above else []
    return PathFinder.find_spec(name, folders) if folders else None


def _imports(module: str, file: Path) -> Iterator[str]:
    """The names of all modules that a module may import, anywhere in it, and those above them.

    `from a import b` may mean a module a.b: a name that is none has no file. A relative import that
    leads out of the package fails where the code runs.
    """
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = [module]
    for node in ast.walk(without_docstrings(_source(file))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):
                origin = resolve_name("." * node.level + (node.module or ""), package or None)
                names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:i]) for i in range(1, len(parts) + 1))


def _syntax_hash(file: Path) -> str:
    status = file.stat()
    return _syntax_hash_of(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2**12)
def _syntax_hash_of(file: Path, modified_ns: int, size: int) -> str:
    """The hash of a file's syntax; time and size tell the cache that the file is the same."""
    text = ast.unparse(without_docstrings(_source(file)))
    return HASH + hashlib.sha256(text.encode()).hexdigest()[:16]


def _source(file: Path) -> str:
    """The text of a Python file, in the encoding that it declares; of no Python, byte by byte."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):
        return file.read_text("latin-1")


@lru_cache(maxsize=64)
def without_docstrings(source: str) -> ast.AST:
    """The syntax tree of Python source without docstrings; it has no comments and no layout.

    Of a file that is no Python, as one of a later version, it is the text.
    """
    try:
        tree = ast.parse(textwrap.dedent(source))
    except (SyntaxError, ValueError):  # ValueError: of a NUL
        tree = ast.Expression(ast.Constant(source))
    return _WithoutDocstrings().visit(tree)


class _WithoutDocstrings(ast.NodeTransformer):
    """Removes string literals that are statements: docstrings, also those under attributes."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """None, which removes the statement, for a string."""
        value = node.value
        is_text = isinstance(value, ast.Constant) and isinstance(value.value, str)
        return None if is_text else node
