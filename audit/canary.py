"""The canary test: unmistakable records go into a private set, a run is done, and all that left is searched for them.

It cannot show that nothing leaks: a mean moves with every sample. It shows that no record, nor a part of one, is in what left,
as it is or in a usual disguise; and with each search goes a control, a reply that does hide the record and has to be found.
"""

import base64
import binascii
import bz2
import lzma
import re
import secrets
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private
from metamoe.common.data.tasks import class_names
from metamoe.common.errors import MetaMoEError
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.presets import changed
from metamoe.common.wire import Kind, RecordDict
from metamoe.server.stages import run_stages

_WINDOW = 24
"""Numbers in a row that are searched for: few enough for a fragment to be found, too many to be there by chance."""
_DECOMPRESSORS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x78[\x01\x5e\x9c\xda]": lambda data: zlib.decompressobj().decompress(data, 10**7),
    b"\x1f\x8b\x08": lambda data: zlib.decompressobj(31).decompress(data, 10**7),
    b"BZh[1-9]": lambda data: bz2.BZ2Decompressor().decompress(data, 10**7),
    b"\xfd7zXZ\x00": lambda data: lzma.LZMADecompressor().decompress(data, 10**7),
}


@dataclass(frozen=True)
class Canary:
    """One planted record: a text that no data has by chance, and an image of noise."""

    token: str
    pixels: np.ndarray


@dataclass(frozen=True)
class Search:
    """Bytes searched by place, what was found of the canaries, and which controls were not found though they were there."""

    places: dict[str, int]
    controls: int
    found: list[str]
    blind: list[str]


def run_canary(settings: Settings, out: Path, count: int = 3) -> Search:
    """Plant ``count`` canaries in the private set of each client, run all stages in this process, and search all that left.

    Args:
        settings: of the run; its built-in domains become the clients' own data.
        out: an empty folder.
        count: canaries of a client.

    Returns:
        Bytes searched by place, and what was found.

    Raises:
        MetaMoEError: the run failed.
    """
    seed = load_seed(settings.seed_model)
    canaries: list[Canary] = []
    classes: set[str] = set()
    for client in range(settings.clients):
        folder = out / "data" / f"client-{client}"
        training = load_private(settings, client, "train")
        _write_images(training, folder / "train")
        # A class without a training image is none to a client with its own data.
        known = {path.name for path in (folder / "train").iterdir()}
        _write_images(load_private(settings, client, settings.data.evaluate_on), folder / settings.data.evaluate_on, known)
        classes |= known
        canaries += _plant(folder / "train", np.asarray(training[0]["image"]).shape[:2], count)
    names = ", ".join(f'"{name}"' for name in sorted(classes))
    own = changed(settings, ["data.private=own", f"data.domains={settings.client_names}", f"data.classes=[{names}]"])

    left: dict[str, bytes] = {}

    def ask(kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict | MetaMoEError]]:
        for client, content in requests.items():
            site = Site(client, out / "clients", out / "data" / f"client-{client}")
            try:
                reply = audited(kind, content, site, partial(respond, kind, site=site))
            except MetaMoEError as error:
                yield client, error
                continue
            left[f"client {client}, {kind}"] = _as_sent(reply)
            yield client, reply

    run_stages(own, range(own.clients), ask, out)
    for part in ("server", "model"):
        for file in sorted(path for path in (out / part).rglob("*") if path.is_file()):
            left[file.relative_to(out).as_posix()] = file.read_bytes()
    for client in range(own.clients):
        # What an export would hand to a third party.
        audit = Site(client, out / "clients").audit
        for file in sorted(path for path in audit.iterdir() if path.suffix in (".jsonl", ".json", ".toml", ".pub")):
            left[f"ledger of client {client}, {file.name}"] = file.read_bytes()
    return search(left, needles(canaries, seed))


def needles(canaries: list[Canary], seed: Seed) -> dict[str, list[bytes]]:
    """Byte strings to search for, by disguise: texts and rows of pixels, as they are and as numbers of any usual form."""
    found: dict[str, list[bytes]] = {"text": [], "pixels": []}
    for canary in canaries:
        found["text"].append(canary.token.encode())
        image = PILImage.fromarray(canary.pixels)
        prepared = np.asarray(seed.processor(images=image, return_tensors="np")["pixel_values"][0], dtype=np.float64)
        middle = canary.pixels.shape[0] // 2
        raw = canary.pixels[middle, :_WINDOW, 0].astype(np.float64)
        found["pixels"].append(raw.astype(np.uint8).tobytes())
        for what, values in {"pixels": raw, "pixels/255": raw / 255, "model input": prepared[0, len(prepared[0]) // 2]}.items():
            for kind in ("<f2", "<f4", "<f8", ">f4"):
                found.setdefault(f"{what} as {kind}", []).append(values[:_WINDOW].astype(kind).tobytes())
            coarse = (values[:_WINDOW].astype("<f4").view(np.uint32) & np.uint32(0xFFFFE000)).tobytes()
            found.setdefault(f"{what} as <f4, ten bits", []).append(coarse)
    return found


def search(left: Mapping[str, bytes], wanted: Mapping[str, list[bytes]]) -> Search:
    """Look for every needle in every place: as it is, in hexadecimal, in base64, and within whatever decompresses."""
    found = [f"{what} in {place}" for place, content in left.items() for what in _hits(content, wanted)]
    noise = secrets.token_bytes(999)
    controls = {
        f"{what}, {disguise}": noise + hide(strings[0]) + noise
        for what, strings in wanted.items()
        for disguise, hide in _DISGUISES.items()
    }
    blind = [name for name, content in controls.items() if not any(_hits(content, wanted))]
    return Search({place: len(content) for place, content in left.items()}, len(controls), found, blind)


_DISGUISES: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda data: data,
    "backwards": lambda data: data[::-1],
    "hexadecimal": lambda data: data.hex().encode(),
    "base64": lambda data: base64.b64encode(b"x" + data + b"yz"),
    "zlib": lambda data: zlib.compress(b"xyz" + data),
    "gzip": lambda data: zlib.compress(data, wbits=31),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def _hits(content: bytes, wanted: Mapping[str, list[bytes]]) -> Iterator[str]:
    for form, readable in _readings(content):
        for what, strings in wanted.items():
            if any(string in readable for string in strings):
                yield f"{what} ({form})"


def _readings(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The bytes, and all that they may be another writing of."""
    yield "as it is", content
    yield "backwards", content[::-1]
    for run in re.findall(rb"[0-9a-fA-F]{16,}", content):
        for start in (0, 1):
            text = run[start : start + (len(run) - start) // 2 * 2]
            yield "hexadecimal", binascii.unhexlify(text)
    for run in re.findall(rb"[A-Za-z0-9+/_-]{16,}", content):
        for start in range(4):
            text = run[start : start + (len(run) - start) // 4 * 4]
            yield "base64", base64.b64decode(text.replace(b"-", b"+").replace(b"_", b"/"))
    for magic, decompress in _DECOMPRESSORS.items():
        for match in re.finditer(magic, content, re.DOTALL):
            try:
                yield "compressed", decompress(content[match.start() :])
            except (zlib.error, OSError, lzma.LZMAError, ValueError):
                continue


def _as_sent(content: RecordDict) -> bytes:
    """Every name and every byte of a reply, one after the other."""
    parts = [repr(content).encode()]
    for record in content.array_records.values():
        parts += [array.data for array in record.values()]
    return b"\n".join(parts)


def _write_images(data: Dataset, folder: Path, known: Container[str] | None = None) -> None:
    names = class_names(data)
    for number, row in enumerate(data):
        target = folder / names[row["label"]]
        if known is not None and target.name not in known:
            continue
        target.mkdir(parents=True, exist_ok=True)
        row["image"].save(target / f"{number}.png")


def _plant(train: Path, size: tuple[int, ...], count: int) -> list[Canary]:
    """Canaries in the class folders of a client's training data, the text in the file's name and in the image's metadata."""
    folders = sorted(train.iterdir())
    canaries = []
    for number in range(count):
        pixels = np.frombuffer(secrets.token_bytes(size[0] * size[1] * 3), np.uint8).reshape(*size, 3)
        canary = Canary("CANARY" + secrets.token_hex(16), pixels)
        info = PngInfo()
        info.add_text("Comment", canary.token)
        PILImage.fromarray(canary.pixels).save(folders[number % len(folders)] / f"{canary.token}.png", pnginfo=info)
        canaries.append(canary)
    return canaries
