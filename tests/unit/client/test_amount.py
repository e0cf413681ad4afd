"""The amount of a client's data: two clients that differ in nothing else cannot be told apart by what leaves them."""

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from PIL import Image
from safetensors import safe_open

from metamoe.audit.ledgers import Found, write_bundle
from metamoe.client.app import app
from metamoe.common.audit.ledger import LEDGER
from metamoe.common.audit.policy import SIMULATION, policy_text
from metamoe.common.config import Settings
from metamoe.common.errors import MetaMoEError
from metamoe.common.presets import changed
from metamoe.common.wire import CLIENT_ERROR_CODE, MESSAGE_TYPE, Kind
from metamoe.server.stages import run_stages

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("identity")]

FEW, MANY = 50, 5_000
OWN = ("clients=1", "data.private=own", 'data.domains=["east"]', "data.private-samples=0")
MODES = {
    "default": (),
    "private routing vectors": ("router.vectors=private",),
    "relevance classifier": ("proxies.relevance=classifier",),
    "proxies alone": ("proxies.selection=random", "router.vectors=proxy"),
    "differential privacy": (
        *("privacy.vectors=gaussian", "privacy.expert=dp-sgd", f"privacy.min-samples={FEW}"),
        *("privacy.expert-batch-size=25", "privacy.expert-epochs=1"),
    ),
}


def images(folder: Path, count: int) -> Path:
    """Images of 8 x 8 pixels in two classes: so many for training, and always four to evaluate on."""
    rng = np.random.default_rng(count)
    for split, number in (("train", count), ("test", 4)):
        for i in range(number):
            file = folder / split / ("DIGIT ONE", "DIGIT TWO")[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [images(tmp_path_factory.mktemp("own"), count) for count in (FEW, MANY)]


@dataclass
class Client:
    """One deployed client: its folders, and every message that left it."""

    state: Path
    data: Path
    policy: Path
    left: list[Message] = field(default_factory=list)

    def ask(self, kind: Kind, requests: dict[int, RecordDict]) -> Iterator[tuple[int, RecordDict | MetaMoEError]]:
        """By the app itself, from one Flower message to another."""
        node = {"partition-id": 0, "state-dir": str(self.state), "data-dir": str(self.data), "policy": str(self.policy)}
        for address, content in requests.items():
            message = Message(content, dst_node_id=2, message_type=MESSAGE_TYPE[kind])
            reply = app(message, Context(1, 2, node, RecordDict(), {}))
            self.left.append(reply)
            yield address, reply.content if reply.has_content() else MetaMoEError(str(reply.error))


@pytest.fixture
def clients(folders: list[Path], tmp_path: Path) -> list[Client]:
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text(SIMULATION))
    return [Client(tmp_path / data.name / "state", data, policy) for data in folders]


def form(message: Message) -> dict[str, Any]:
    """All of a message but random ids, the numbers in its arrays, and the time, for which replies wait (test_egress.py)."""
    random, timed = ("_message_id", "_reply_to_message_id"), ("_created_at", "_ttl")
    metadata = {name: value for name, value in vars(message.metadata).items() if name not in random + timed}
    if message.has_error():
        return {"metadata": metadata, "error": vars(message.error)}
    arrays = {
        f"{record}/{name}": (array.dtype, array.shape, array.stype, len(array.data))
        for record, arrays in message.content.array_records.items()
        for name, array in arrays.items()
    }
    assert set(message.content) == set(message.content.array_records)
    return {"metadata": metadata, "arrays": arrays}


MEASURED = ("ids", "time", "timings", "cpu_seconds", "memory", "peak_memory")


def masked(value: Any) -> Any:
    """JSON without hashes, keys, signatures, times, and measured numbers; whole numbers stay."""
    match value:
        case dict():
            return {key: masked(of) for key, of in value.items() if key not in MEASURED}
        case list():
            return [masked(of) for of in value]
        case float():
            return "number"
        case str():
            return re.sub(r"[0-9a-f]{32,}", "hash", value)
    return value


def shape_of(file: Path) -> Any:
    """What a file at the server says, without what is measured or learnt."""
    match file.suffix:
        case ".json":
            return masked(json.loads(file.read_text()))
        case ".jsonl":
            return [masked(json.loads(line)) for line in file.read_text().splitlines()]
        case ".safetensors":
            with safe_open(file, "np") as arrays:
                return {name: arrays.get_slice(name).get_shape() for name in arrays.keys()}, masked(arrays.metadata())  # noqa: SIM118
    return file.stat().st_size


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_fifty_samples_leave_as_five_thousand_do(
    small: Settings, clients: list[Client], tmp_path: Path, mode: tuple[str, ...]
) -> None:
    """Messages with their metadata, all files at the server, the ledger, and the bundle that a third party gets."""
    settings = changed(small, [*OWN, *mode, "report-accuracy=true"])
    seen = []
    for number, client in enumerate(clients):
        out = tmp_path / f"out-{number}"
        run_stages(settings, [7], client.ask, out)
        ledger = client.state / "audit" / "client-0"
        write_bundle(Found(ledger, ledger.name, ledger / "audit.pub"), out / "bundle.zip")
        with zipfile.ZipFile(out / "bundle.zip") as bundle:
            sizes = [(entry.filename, entry.file_size) for entry in bundle.infolist()]
        (out / "bundle.zip").unlink()
        files = {str(file.relative_to(out)): shape_of(file) for file in sorted(out.rglob("*")) if file.is_file()}
        lines = (ledger / LEDGER).read_text()
        seen.append(([form(message) for message in client.left], files, len(lines), shape_of(ledger / LEDGER), sizes))
    few, many = seen
    assert len(few[0]) == 3
    assert len(few[1]) > 5
    for part, other in zip(few, many, strict=True):
        assert part == other


def test_an_error_is_the_same_number_for_fifty_as_for_five_thousand(small: Settings, clients: list[Client]) -> None:
    """A class that was not agreed on stops both, and neither says how much it had read by then."""
    settings = changed(small, OWN)
    seen = []
    for client in clients:
        stray = client.data / "train" / "PATIENT 4711" / "1.png"
        stray.parent.mkdir()
        Image.new("L", (8, 8)).save(stray)
        try:
            with pytest.raises(MetaMoEError):
                run_stages(settings, [7], client.ask, client.state / "out")
        finally:
            stray.unlink()
            stray.parent.rmdir()
        seen.append((form(client.left[0]), shape_of(client.state / "audit" / "client-0" / LEDGER)))
    assert seen[0] == seen[1]
    assert seen[0][0]["error"]["_reason"] == ""
    assert seen[0][0]["error"]["_code"] > CLIENT_ERROR_CODE
