"""`python killed.py WHAT CALL WHEN SIGNAL SETTING...`: a `lora-lab train` that is stopped.

It sends itself SIGNAL `before` or `after` WHAT, as module:Class.function, is called for the
CALL-th time.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


def at(what: str, call: int, when: str, act: Callable[[], object]) -> tuple[Any, str, Any]:
    """What monkeypatch.setattr takes so that `act` is called before or after that call."""
    owner, _, name = what.replace(":", ".").rpartition(".")
    holder = resolve_name(owner)
    real, left = getattr(holder, name), call

    @functools.wraps(real)
    def stopped(*args: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if not left and when == "before":
            act()
        result = real(*args, **named)
        if not left and when == "after":
            act()
        return result

    return holder, name, stopped


def main() -> None:
    what, call, when, signum, *settings = sys.argv[1:]
    setattr(*at(what, int(call), when, lambda: os.kill(os.getpid(), signal.Signals[signum])))
    from lora_lab import train

    sys.argv[1:] = settings
    train.main()


if __name__ == "__main__":
    main()
