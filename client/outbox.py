"""What a client has answered, in a run and in all of them: the same bytes can be sent again, and no others."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metamoe.client.site import Site
from metamoe.common.arrays import read_arrays, write_arrays
from metamoe.common.errors import StateFileError
from metamoe.common.wire import Kind

_ARRAYS, _AUDIT = "arrays/", "audit/"


@dataclass(frozen=True)
class Answer:
    """A reply: its arrays, and those that are added for the audit."""

    arrays: dict[str, np.ndarray]
    audit: dict[str, np.ndarray]


class Outbox:
    """Replies of one client, a file for each stage."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_run(cls, site: Site, run: str) -> "Outbox":
        """Those of one run."""
        return cls(site.state / "outbox" / f"client-{site.client}" / run)

    @classmethod
    def of_all_runs(cls, site: Site, asked: str) -> "Outbox":
        """Those to one question, whichever run asks it."""
        return cls(site.state / "released" / f"client-{site.client}" / asked)

    def keep(self, kind: Kind, asked: str, answer: Answer) -> None:
        """Write a reply down; when this returns it is on disk.

        Args:
            kind: the stage.
            asked: hash of what was asked, see :func:`metamoe.common.wire.question_hash`.
            answer: the reply.
        """
        named = [(_ARRAYS, answer.arrays), (_AUDIT, answer.audit)]
        arrays = {prefix + name: array for prefix, part in named for name, array in part.items()}
        write_arrays(self._file(kind), arrays, {"asked": asked})

    def kept(self, kind: Kind, asked: str) -> Answer | None:
        """The reply to this very question; None where there is none that is whole."""
        with suppress(StateFileError):
            arrays, about = read_arrays(self._file(kind))
            if about["asked"] == asked:
                return Answer(_part(arrays, _ARRAYS), _part(arrays, _AUDIT))
        return None

    def holds(self, kind: Kind) -> bool:
        """Whether there is a whole reply of this stage, to whatever question."""
        try:
            read_arrays(self._file(kind))
        except StateFileError:
            return False
        return True

    def forget(self, kind: Kind) -> None:
        """A reply has served, and is not kept any longer."""
        self._file(kind).unlink(missing_ok=True)

    def _file(self, kind: Kind) -> Path:
        return self._folder / f"{kind}.safetensors"


def _part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
