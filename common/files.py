"""Writing so that a reader sees the whole file or none of it."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from safetensors import SafetensorError

from metamoe.common.errors import RunFailedError, StateFileError

_LOCK = ".lock"
_MOMENT = 0.5
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def cache_folder() -> Path:
    """Where data that can be made again is kept: ``$METAMOE_CACHE`` or the user's cache folder."""
    return Path(os.environ.get("METAMOE_CACHE") or user_cache_path("metamoe")).absolute()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, flush it to disk, and move it there."""
    temporary = _beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_secret(path: Path, content: str) -> bool:
    """Make a file that its owner alone can read, whole or not at all; one that is there stays. Whether it was made."""
    temporary = _beside(path)
    try:
        # The mode is set when the file is made: nobody can have read it before.
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)
    return True


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote."""
    return json.loads(path.read_text())


def made_once(kind: str, settings: Sequence[object], files: Iterable[str], make: Callable[[], str]) -> str:
    """What is made of files, from the cache unless one of them has changed by its size or time; of a file at a hub, whose name
    has its commit, nothing more is asked.

    Args:
        kind: of what is made.
        settings: all else that decides it, as JSON has it.
        files: paths, or addresses.
        make: makes it; if that fails, nothing is kept.
    """
    made_of = [version("metamoe-fl"), *settings, [(file, *_state(file)) for file in files]]
    kept = cache_folder() / kind / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    if not kept.is_file():
        found = make()
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, found)
    return kept.read_text()


def _state(file: str) -> tuple[int, int]:
    if "://" in file:
        return 0, 0
    stat = Path(file).stat()
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``path`` if the block ends well and vanishes if it does not."""
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for entry in [temporary, *temporary.rglob("*")]:
            _sync(entry)
        # A folder cannot replace one that is not empty: the old one steps aside, and goes when the new one is in its place.
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other process work in a folder while the block runs.

    Raises:
        RunFailedError: one does.
        StateFileError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        # Who only asks whether somebody does holds it for a moment.
        lock.acquire(timeout=_MOMENT)
    except Timeout as error:
        raise RunFailedError(f"another process works in {folder}; wait for it, or end it") from error
    except OSError as error:
        raise StateFileError(f"the folder {folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Let what a disk refuses, as it is full or read-only, be named.

    Raises:
        StateFileError: in place of the disk's own error, or safetensors' that hides one.
    """
    try:
        yield
    except SafetensorError as error:
        raise StateFileError(f"{folder} cannot be written: {error}") from error
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise StateFileError(f"{folder} cannot be written: {error}") from error


def worked_on(folder: Path) -> bool:
    """Whether a process works in a folder, by :func:`alone`; the folder need not be one that can be written."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # What the lock of alone() is made of; shared, so that those who only ask do not see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _beside(path: Path) -> Path:
    """A name of its own in the same folder, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
