"""What the server has asked and how far each answer is, on disk: a gateway that is started again goes on where it was.

MESSAGE ID/asked.pb       the message and the tree of its objects, as the server gave them
           objects/       those of its objects that say what is asked; not its arrays
           reply.pb       what the SuperNode pushed of its reply's objects: the message, and their tree
           pushed/        those objects, as they come
           ready.pb       the message that leaves, made anew, and root.bin, its object
           session.pb     what the server answered to it, while its objects are on their way
           done           it has left
"""

import hashlib
import shutil
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from google.protobuf.message import DecodeError

from metamoe.audit.gateway.fleet import objects_of
from metamoe.common.errors import ProtocolError, StateFileError
from metamoe.common.files import write_atomically
from metamoe.common.wire import REQUEST

_KEPT_SECONDS = 86_400
_TYPES = (b"RecordDict ", b"ConfigRecord ")
_LARGEST = 4_000_000


class Asked:
    """One message of the server's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._pulled = PullMessagesResponse.FromString((folder / "asked.pb").read_bytes())
        except (OSError, DecodeError) as error:
            raise StateFileError(f"{folder} holds no message of the server's: {error}") from error

    @property
    def id(self) -> str:
        return self.folder.name

    @cached_property
    def message(self) -> Message:
        """The message, without content."""
        return message_from_proto(self._pulled.messages_list[0])

    @cached_property
    def objects(self) -> frozenset[str]:
        """The ids of its objects."""
        return frozenset(objects_of(self._pulled.message_object_trees[0]))

    @property
    def came(self) -> float:
        """When, in seconds since 1970."""
        return (self.folder / "asked.pb").stat().st_mtime

    @property
    def is_done(self) -> bool:
        return (self.folder / "done").exists()

    def keep(self, object_id: str, content: bytes) -> None:
        """Keep an object that the server gave, if it says what is asked."""
        if content.startswith(_TYPES) and len(content) <= _LARGEST:
            write_atomically(self.folder / "objects" / object_id, content)

    def content(self) -> RecordDict:
        """What is asked, without arrays.

        Raises:
            ProtocolError: the SuperNode has not pulled it, or it is no request of ours.
        """
        for file in sorted((self.folder / "objects").glob("*")):
            content = file.read_bytes()
            if content.startswith(_TYPES[1]):
                return RecordDict({REQUEST: ConfigRecord.inflate(content)})
        raise ProtocolError(f"the request {self.id[:8]} has no settings, or was not pulled")

    def reply(self) -> PushMessagesRequest | None:
        """What the SuperNode pushed of its reply's objects."""
        return _read(self.folder / "reply.pb", PushMessagesRequest)

    def keep_reply(self, request: PushMessagesRequest, room: int) -> None:
        """Keep what the SuperNode pushed of its reply's objects, and how many bytes they may have."""
        write_atomically(self.folder / "room", str(room))
        write_atomically(self.folder / "reply.pb", request.SerializeToString(deterministic=True))

    @cached_property
    def room(self) -> int:
        """The most bytes that the objects of its reply may have."""
        return int((self.folder / "room").read_text())

    def pushed(self, object_id: str) -> bytes:
        """An object of the reply.

        Raises:
            ProtocolError: it was not pushed.
        """
        try:
            return (self.folder / "pushed" / object_id).read_bytes()
        except OSError as error:
            raise ProtocolError(f"object {object_id[:8]} was not pushed") from error

    def pushed_bytes(self) -> dict[str, int]:
        """The objects of the reply that have come, and their sizes."""
        found = (self.folder / "pushed").glob("[0-9a-f]*") if (self.folder / "pushed").is_dir() else []
        return {file.name: file.stat().st_size for file in found}

    def push(self, object_id: str, content: bytes) -> None:
        """Keep an object of the reply."""
        write_atomically(self.folder / "pushed" / object_id, content)

    def finish(self) -> None:
        """It is answered: what the answer was made of goes."""
        write_atomically(self.folder / "done", b"")
        shutil.rmtree(self.folder / "pushed", ignore_errors=True)
        for name in ("ready.pb", "root.bin", "session.pb"):
            (self.folder / name).unlink(missing_ok=True)


class Requests:
    """All messages of the server's, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in folder.glob("*/done"):
            if time.time() - file.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(file.parent, ignore_errors=True)

    def add(self, pulled: PullMessagesResponse) -> Asked:
        """Keep one message."""
        folder = self._folder / pulled.messages_list[0].metadata.message_id
        if not (folder / "asked.pb").exists():
            write_atomically(folder / "asked.pb", pulled.SerializeToString(deterministic=True))
        return Asked(folder)

    def get(self, message_id: str) -> Asked | None:
        """The message with this id, if the server has sent it."""
        known = len(message_id) == 64 and message_id.isalnum() and (self._folder / message_id / "asked.pb").is_file()
        return Asked(self._folder / message_id) if known else None

    def of_run(self, run: int) -> list[Asked]:
        """Those of one run of Flower's that are not answered."""
        return [asked for asked in self._all() if asked.message.metadata.run_id == run and not asked.is_done]

    def _all(self) -> Iterator[Asked]:
        return (Asked(file.parent) for file in sorted(self._folder.glob("*/asked.pb")))


def _read(file: Path, kind: type[PushMessagesRequest]) -> PushMessagesRequest | None:
    return kind.FromString(file.read_bytes()) if file.is_file() else None


def is_named_by(object_id: str, content: bytes) -> bool:
    """Whether an object's content has the hash by which it is called."""
    return hashlib.sha256(content).hexdigest() == object_id
