"""Why what a `_target_` names cannot be imported, and the nearest name that can be."""

from importlib import import_module
from pkgutil import iter_modules

from lora_lab.config import project
from lora_lab.config.errors import nearest


def import_failure(target: str, error: Exception) -> str:
    """The cause of the `error` of an import, in one line, with the nearest valid name.

    pkgutil.resolve_name takes each ImportError inside a module for an attribute that its package
    has not: so the module is imported once more by itself.
    """
    module, _, name = target.replace(":", ".").rpartition(".")
    hint = ""
    try:
        names = vars(import_module(module)) if module else ()
        hint = nearest(name, [n for n in names if not n.startswith("_")])
    except ModuleNotFoundError as missing:
        error = missing
        hint = _missing_module(module, missing.name or "")
    except Exception as cause:
        error = cause
    return " ".join(str(error).split()) + hint


def _missing_module(module: str, missing: str) -> str:
    """The end of the message that a module is `missing` which is needed for another."""
    package, _, name = missing.rpartition(".")
    if module != missing and not module.startswith(f"{missing}."):
        return f" (imported by {module})"
    if package:
        places = getattr(import_module(package), "__path__", ())
        return nearest(name, [found.name for found in iter_modules(places)])
    if project.project:
        path = project.project.import_path
        return (
            nearest(name, [m.name for m in iter_modules([str(path)])]) or f" (looked for in {path})"
        )
    return "; modules of a project are known in its folder, and with --project DIR"
