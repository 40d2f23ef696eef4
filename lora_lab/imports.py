"""Fast imports of large libraries."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_imports() -> Iterator[None]:
    """Within it modules are imported fast, and the garbage collector never looks at them again.

    An import makes very many objects that all stay. Collecting in between finds nothing, and each
    later collection, the last one at exit, would go through all of them.
    """
    module_count = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    # Only after a real import. In a later job of this process nothing new is imported, and freezing
    # again would keep what the jobs before it left to be collected.
    if len(sys.modules) > module_count:
        gc.freeze()
