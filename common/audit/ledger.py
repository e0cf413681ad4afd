"""A ledger on disk: hash-chained lines that are only ever added, each flushed to disk before it counts."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from filelock import FileLock
from pydantic import ValidationError

from metamoe.common.audit.entries import (
    FIRST,
    Entry,
    Head,
    Line,
    Open,
    Seal,
    canonical,
    head_statement,
    seal_statement,
)
from metamoe.common.audit.keys import audit_key, public_file, public_hex
from metamoe.common.audit.merkle import merkle_root
from metamoe.common.errors import LedgerError
from metamoe.common.files import write_atomically

LEDGER, HEAD = "ledger.jsonl", "head.json"


def _now() -> datetime:
    return datetime.now(UTC)


class Ledger:
    """The ledger in a folder: ``ledger.jsonl``, ``head.json``, and the key that signs.

    Args:
        folder: made if need be.
        key: the key of another folder; None for the folder's own, made if need be.
        now: the clock.
    """

    def __init__(self, folder: Path, key: Ed25519PrivateKey | None = None, now: Callable[[], datetime] = _now) -> None:
        self._file, self._head, self._now = folder / LEDGER, folder / HEAD, now
        with _ledger_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Two processes that come at the same time must not make two keys, or write one line each over the other.
            self._lock = FileLock(folder / ".lock")
            with self._lock:
                self._key = key or audit_key(folder)
                self.public = public_hex(self._key)
                if key and not public_file(folder).is_file():
                    write_atomically(public_file(folder), self.public + "\n")
        self._end: tuple[int, int, str] | None = None

    def sign(self, statement: bytes) -> str:
        """Signature over a statement, hexadecimal."""
        return self._key.sign(statement).hex()

    def append(self, *entries: Entry) -> None:
        """Add lines; when this returns they are on disk.

        Raises:
            LedgerError: they could not be written (nothing may be sent then), or the ledger's end is not what it was.
        """
        with _ledger_errors(self._file), self._lock:
            size, count, last = self._known_end()
            text = b""
            for entry in entries:
                line = canonical(Line(seq=count, prev=last, time=self._now().strftime("%Y-%m-%dT%H:%MZ"), entry=entry))
                count, last, text = count + 1, _hash(line), text + line + b"\n"
            with self._file.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            head = Head(count=count, last=last, signature=self.sign(head_statement(count, last)))
            write_atomically(self._head, canonical(head) + b"\n")
            self._end = size + len(text), count, last

    def open(self, entry: Open) -> None:
        """Begin a run, unless it has begun."""
        if not any(isinstance(known, Open) for known in self.run(entry.run)):
            self.append(entry)

    def entries(self) -> list[Entry]:
        """All entries, of all runs.

        Raises:
            LedgerError: a line is none.
        """
        with _ledger_errors(self._file), self._lock:
            return [_parsed(raw).entry for raw in self._whole_lines()]

    def run(self, run: str) -> list[Entry]:
        """The entries of one run so far.

        Raises:
            LedgerError: a line is none.
        """
        return [line.entry for line, _ in self._lines(run)]

    def seal(self, run: str) -> Seal:
        """Sign the Merkle root over all lines of a run so far, and add that as a line, unless the last line is one."""
        lines = self._lines(run)
        if lines and isinstance(last := lines[-1][0].entry, Seal):
            return last
        leaves = [raw for _, raw in lines]
        root = merkle_root(leaves).hex()
        seal = Seal(run=run, count=len(leaves), root=root, signature=self.sign(seal_statement(run, len(leaves), root)))
        self.append(seal)
        return seal

    def _lines(self, run: str) -> list[tuple[Line, bytes]]:
        with _ledger_errors(self._file), self._lock:
            # A run's name is in each of its lines; the others need not be parsed.
            found = [(raw, run.encode() in raw) for raw in self._whole_lines()]
        return [(line, raw) for raw, wanted in found if wanted for line in [_parsed(raw)] if line.entry.run == run]

    def _known_end(self) -> tuple[int, int, str]:
        """Bytes and lines so far, and the hash of the last; read anew only if another process has written."""
        size = self._file.stat().st_size if self._file.exists() else 0
        if self._end is None or self._end[0] != size:
            lines = self._whole_lines()
            self._check_end(lines)
            size = sum(len(line) + 1 for line in lines)
            self._end = size, len(lines), _hash(lines[-1]) if lines else FIRST
        return self._end

    def _check_end(self, lines: list[bytes]) -> None:
        """A ledger that lost lines is not written on: that would hide it."""
        if not self._head.exists():
            return
        head = Head.model_validate_json(self._head.read_bytes())
        if head.count > len(lines) or (head.count and _hash(lines[head.count - 1]) != head.last):
            raise LedgerError(
                f"{self._file} does not end as {self._head.name} says: lines were removed or changed; keep both files for an "
                "audit and move them away to begin a new ledger"
            )

    def _whole_lines(self) -> list[bytes]:
        """All lines. One that a crash cut short never counted: nothing was sent after it, and it goes."""
        if not self._file.exists():
            return []
        content = self._file.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self._file, end)
        return content[:end].splitlines()


@lru_cache(maxsize=4_096)
def _parsed(line: bytes) -> Line:
    """A line, which is read again for every message, and never changes."""
    return Line.model_validate_json(line)


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


@contextmanager
def _ledger_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be written, so nothing is sent: {error}") from error
    except ValidationError as error:
        raise LedgerError(f"{path} holds a line that is not a ledger's: {error.errors()[0]['msg']}") from error
