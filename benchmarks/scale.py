"""A simulation as it grows: a thousand clients that train nothing under real Flower and Ray, and what a client costs in bytes."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from flwr.common.serde import recorddict_to_proto

from common.config import Settings, load_settings, to_toml
from common.files import write_atomically
from common.model.lora import expert_layers, expert_shapes
from common.model.seed import load_seed
from common.wire import encode_reply, reply_artifacts
from simulations.flower import run_flower

Row = dict[str, float | str]
_ROOT = Path(__file__).parents[1]


def many_clients(count: int = 1_000, folder: Path | None = None) -> dict[str, Row]:
    """All stages with ``count`` clients of ``benchmarks.stub``: seconds beside the bar of 600, and the largest memory of the
    process that is Flower's simulation with the server in it, beside the bar of 1.5 GB.

    Args:
        count: of clients.
        folder: where the run is left; None for nowhere.
    """
    settings = load_settings("glyphs", [f"clients={count}", "compute.connect-timeout=300"])
    with TemporaryDirectory() as temporary:
        out = folder or Path(temporary)
        seconds, memory = _run(settings, out, "benchmarks.stub:app")
        timings = json.loads((out / "server" / "summary.json").read_text())["timings"]
    print(f"{count} clients, seconds of each stage: {timings}")  # noqa: T201
    return {
        f"{count:,} clients without training, wall": {"ours": seconds, "peer": 600.0, "ratio": seconds / 600, "unit": "s"},
        f"{count:,} clients without training, server's peak": {
            "ours": memory / 1e6,
            "peer": 1_500.0,
            "ratio": memory / 1.5e9,
            "unit": "MB",
        },
    }


def more_clients(few: int = 10, many: int = 100) -> dict[str, Row]:
    """Wall seconds for each client with real training on small partitions of glyphs, with many clients beside few."""
    seconds = {}
    for count in (few, many):
        overrides = [f"clients={count}", "data.private-samples=40", "proxies.count=40", "expert-training.epochs=2"]
        with TemporaryDirectory() as folder:
            _run(load_settings("glyphs", overrides), Path(folder), "client.app:app")
            timings = json.loads(Path(folder, "server", "summary.json").read_text())["timings"]
        seconds[count] = sum(timings[stage] for stage in ("profile", "select", "expert", "deliver")) / count
    name = f"a client of {many} that trains, against one of {few}, wall"
    return {name: {"ours": seconds[many], "peer": seconds[few], "ratio": seconds[many] / seconds[few], "unit": "s"}}


def bytes_up() -> dict[str, Row]:
    """What a client sends in all its replies, as Flower encodes them, beside its LoRA parameters in float16 with the declared
    vectors, and beside an expert that is whole feed-forward sublayers.
    """
    settings = load_settings("glyphs")
    seed = load_seed(settings.seed_model)
    sent, vectors = 0, 0
    for kind in ("profile", "expert", "deliver"):
        artifacts = reply_artifacts(kind, settings, seed)
        arrays = {a.name: np.zeros(a.shape, a.dtype) for a in artifacts}
        record = encode_reply(arrays)
        sent += recorddict_to_proto(record).ByteSize() if arrays else 0
        vectors += sum(a.bytes for a in artifacts if ".lora_" not in a.name)
    lora = 2 * sum(int(np.prod(shape)) for shape in expert_shapes(seed, settings.lora).values())
    layers = [seed.model.get_submodule(path) for path in expert_layers(seed, settings.lora)]
    whole = 2 * sum(p.numel() for layer in layers for p in layer.parameters()) + vectors
    return {
        "bytes up, against LoRA and vectors": {
            "ours": sent,
            "peer": lora + vectors,
            "ratio": sent / (lora + vectors),
            "unit": "bytes",
        },
        "bytes up, against whole FFN experts": {"ours": sent, "peer": whole, "ratio": sent / whole, "unit": "bytes"},
    }


def _run(settings: Settings, out: Path, client_app: str) -> tuple[float, int]:
    """Wall seconds of a run, and the largest resident memory of Flower's simulation process."""
    write_atomically(out / "settings.toml", to_toml(settings))
    with _importable(), _peak_memory("flwr-simulation") as peak:
        begin = time.perf_counter()
        run_flower(settings, out, client_app)
        seconds = time.perf_counter() - begin
    return seconds, peak[0]


@contextmanager
def _importable() -> Iterator[None]:
    """The benchmarks are not installed; Flower's processes find them by this."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([before] if before else [])])
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _peak_memory(command: str) -> Iterator[list[int]]:
    """While open, the largest resident memory of a child process whose command line has this word, in bytes."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if any(command in word for word in child.cmdline()):
                        peak[0] = max(peak[0], child.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
