"""Loading large libraries without looking for garbage in between."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """While open, no garbage is collected: for imports of large libraries, and for nothing else.

    They make half a million objects that live as long as the process. To look through them again and again takes a quarter of
    the time of the imports.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
