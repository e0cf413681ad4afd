"""What the audit and being resumable cost: the seconds that each takes out of one run, on both sides, and the disk."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from metamoe.client.outbox import Outbox
from metamoe.common.checkpoint import Checkpoint
from metamoe.common.presets import load_settings
from metamoe.server.exchange import Exchange
from metamoe.server.state import RunState
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
    """One run of preset glyphs in this process: seconds spent in the audit, and in keeping what a stopped run would go on from,
    against those of the whole run; bytes of a client's ledger; and bytes that a client keeps while it trains, and after.
    """
    edge: list[float] = []
    answers: list[float] = []
    server: list[float] = []
    kept: list[float] = []
    outbox: list[float] = []
    training: list[int] = []

    def saved(checkpoint: Checkpoint, *args: Any) -> None:
        save(checkpoint, *args)
        training.append(_bytes(Path(folder, "clients", "digits", "training")))

    save = Checkpoint.save
    with (
        TemporaryDirectory() as folder,
        patch.object(Checkpoint, "save", saved),
        _timed(Checkpoint, "save", kept),
        _timed(RunState, "keep", kept),
        _timed(RunState, "finished", kept),
        _timed(Outbox, "keep", outbox),
        _timed(local, "audited", edge),
        _timed(local, "respond", answers),
        _timed(Exchange, "_arrived", server),
        _timed(Exchange, "close", server),
    ):
        begin = time.perf_counter()
        local.run_local(load_settings("glyphs"), Path(folder))
        run = time.perf_counter() - begin
        after = _bytes(Path(folder, "clients", "outbox", "client-0"))
        expert = _bytes(Path(folder, "server", "experts", "digits"))
        sizes = [sum(file.stat().st_size for file in ledger.iterdir()) for ledger in Path(folder, "clients", "audit").iterdir()]
    audit = sum(edge) - sum(answers) - sum(outbox) + sum(server)
    resumable = sum(kept) + sum(outbox)
    return {
        "audit, wall time of a run": {"ours": audit, "peer": run, "ratio": audit / run, "unit": "s"},
        "audit, disk of a client and run": {
            "ours": max(sizes),
            "peer": 1e6,
            "ratio": max(sizes) / 1e6,
            "unit": "bytes",
        },
        "resumable, wall time of a run": {"ours": resumable, "peer": run, "ratio": resumable / run, "unit": "s"},
        "resumable, disk of a client while it trains": {
            "ours": max(training),
            "peer": expert,
            "ratio": max(training) / expert,
            "unit": "bytes, an expert's",
        },
        "resumable, disk of a client after a run": {
            "ours": after,
            "peer": expert,
            "ratio": after / expert,
            "unit": "bytes, an expert's",
        },
    }


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
