"""The thread that computes: requests that wait are computed together, and join and leave between tokens."""

import itertools
import logging
import threading
from collections.abc import Callable, Sequence

from metamoe.common.model.artifact import Loaded
from metamoe.common.model.generation import Request
from metamoe.writing import Piece, Writer

log = logging.getLogger("metamoe")

Deliver = Callable[[Piece | None], None]
"""Takes a request's next piece, in the thread that computes; None if it could not be computed."""


class Busy(Exception):
    """More requests wait than may."""


class Engine:
    """Computes requests in a thread of its own.

    Args:
        loaded: a model of text.
        at_once: how many are computed together, at most.
        queue: how many may wait beside them.
    """

    def __init__(self, loaded: Loaded, at_once: int, queue: int) -> None:
        self._loaded, self._at_once, self._queue = loaded, at_once, queue
        self._writer = Writer(loaded, at_once)
        self._keys = itertools.count()
        self._changed = threading.Condition()
        self._arrived: dict[int, tuple[Request, Sequence[str]]] = {}
        self._deliver: dict[int, Deliver] = {}
        self._gone: set[int] = set()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the token that is being computed."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """How many requests are computed, and how many wait."""
        computed = self._writer.computed
        return computed, max(0, len(self._deliver) - computed)

    def submit(self, requests: Sequence[tuple[Request, Sequence[str], Deliver]]) -> list[int]:
        """Have requests wait for their turn, each with its stop texts; their keys.

        Raises:
            Busy: too many wait; none of them is taken.
        """
        with self._changed:
            if len(self._deliver) + len(requests) > self._at_once + self._queue:
                raise Busy
            keys = [next(self._keys) for _ in requests]
            for key, (request, stop, deliver) in zip(keys, requests, strict=True):
                self._arrived[key], self._deliver[key] = (request, stop), deliver
            self._changed.notify()
            return keys

    def cancel(self, keys: Sequence[int]) -> None:
        """Forget requests that nobody waits for any more; those that have ended are forgotten already."""
        with self._changed:
            for key in keys:
                if self._deliver.pop(key, None) and self._arrived.pop(key, None) is None:
                    self._gone.add(key)

    def _run(self) -> None:
        while self._take():
            try:
                pieces = self._writer.advance()
            except RuntimeError:
                # Memory, most likely. Those who waited are told, and the next begin afresh.
                log.exception("requests could not be computed")
                self._fail()
                continue
            for key, piece in pieces:
                with self._changed:
                    deliver = self._deliver.get(key)
                    if piece.reason:
                        self._deliver.pop(key, None)
                if deliver:
                    deliver(piece)
        self._fail()

    def _take(self) -> bool:
        """Wait until there is something to compute; false at the end."""
        with self._changed:
            while True:
                for key in self._gone:
                    self._writer.drop(key)
                self._gone.clear()
                for key, (request, stop) in self._arrived.items():
                    self._writer.put(key, request, stop)
                self._arrived.clear()
                if self._ending or len(self._writer):
                    return not self._ending
                self._changed.wait()

    def _fail(self) -> None:
        with self._changed:
            waiting = list(self._deliver.values())
            self._deliver.clear()
            self._arrived.clear()
            self._gone.clear()
            self._writer = Writer(self._loaded, self._at_once)
        for deliver in waiting:
            deliver(None)
