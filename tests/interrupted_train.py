"""`python interrupted_train.py FUNCTION CALL WHEN SIGNAL SETTING...`: a `lora-lab train` cut off.

It sends itself SIGNAL `before` or `after` the CALL-th call of FUNCTION, given as
module:Class.function.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


def acting_at_call(
    function: str, call: int, when: str, action: Callable[[], object]
) -> tuple[Any, str, Any]:
    """Arguments for monkeypatch.setattr, so that `action` runs before or after that call."""
    owner_name, _, name = function.replace(":", ".").rpartition(".")
    owner = resolve_name(owner_name)
    original, calls_left = getattr(owner, name), call

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls_left
        calls_left -= 1
        if not calls_left and when == "before":
            action()
        result = original(*args, **kwargs)
        if not calls_left and when == "after":
            action()
        return result

    return owner, name, wrapper


def main() -> None:
    function, call, when, signal_name, *settings = sys.argv[1:]
    signum = signal.Signals[signal_name]
    setattr(*acting_at_call(function, int(call), when, lambda: os.kill(os.getpid(), signum)))
    from lora_lab import train

    sys.argv[1:] = settings
    train.main()


if __name__ == "__main__":
    main()
