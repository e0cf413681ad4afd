"""What the audit costs: the seconds that policy and ledgers take out of one run, on both sides."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from metamoe.common.presets import load_settings
from metamoe.server.exchange import Exchange
from metamoe.simulations import local


@contextmanager
def _timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """While open, the wall time of every call of a function is added up."""
    real = getattr(owner, name)

    @wraps(real)
    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return real(*args, **options)
        finally:
            seconds.append(time.perf_counter() - begin)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, real)


def audit_cost() -> dict[str, dict[str, float | str]]:
    """One run of preset glyphs in this process: seconds spent in the audit against those of the whole run, and bytes of a
    client's ledger.
    """
    edge: list[float] = []
    answers: list[float] = []
    server: list[float] = []
    with (
        TemporaryDirectory() as folder,
        _timed(local, "audited", edge),
        _timed(local, "respond", answers),
        _timed(Exchange, "_arrived", server),
        _timed(Exchange, "close", server),
    ):
        begin = time.perf_counter()
        local.run_local(load_settings("glyphs"), Path(folder))
        run = time.perf_counter() - begin
        sizes = [sum(file.stat().st_size for file in ledger.iterdir()) for ledger in Path(folder, "clients", "audit").iterdir()]
    audit = sum(edge) - sum(answers) + sum(server)
    return {
        "audit, wall time of a run": {"ours": audit, "peer": run, "ratio": audit / run, "unit": "s"},
        "audit, disk of a client and run": {
            "ours": max(sizes),
            "peer": 1e6,
            "ratio": max(sizes) / 1e6,
            "unit": "bytes",
        },
    }
