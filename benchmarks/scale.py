"""A simulation as it grows: a thousand clients that train nothing under real Flower and Ray; and bytes of a client."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from flwr.common.serde import recorddict_to_proto

from metamoe.common.bundle import CLIENT_APP
from metamoe.common.config import Settings
from metamoe.common.files import write_atomically
from metamoe.common.model.lora import expert_layers, expert_shapes
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import load_settings, to_toml
from metamoe.common.wire import AUDIT_ARTIFACTS, encode_reply, reply_artifacts
from metamoe.simulations.flower import run_flower

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
        wall, cpu, memory = _run(settings, out, "benchmarks.stub:app")
    return {
        f"{count:,} clients without training, wall": {"ours": wall, "peer": 600.0, "ratio": wall / 600, "unit": "s"},
        f"{count:,} clients without training, CPU of two cores": {
            "ours": cpu,
            "peer": 1_200.0,
            "ratio": cpu / 1_200,
            "unit": "s",
        },
        f"{count:,} clients without training, server's peak": {
            "ours": memory / 1e6,
            "peer": 1_500.0,
            "ratio": memory / 1.5e9,
            "unit": "MB",
        },
    }


def more_clients(few: int = 10, many: int = 100) -> dict[str, Row]:
    """CPU seconds for each client, of all processes, with real training on small partitions of glyphs: many clients beside few.

    What a run of one client costs is taken off: it is Ray's start and the public set.
    """
    seconds = {}
    for count in (1, few, many):
        overrides = [f"clients={count}", "data.private-samples=40", "data.dirichlet=100", "proxies.count=40"]
        overrides += ["expert-training.epochs=4", "compute.connect-timeout=300"]
        with TemporaryDirectory() as folder:
            _, seconds[count], _ = _run(load_settings("glyphs", overrides), Path(folder), CLIENT_APP)
    ours, peer = ((seconds[count] - seconds[1]) / (count - 1) for count in (many, few))
    return {
        f"a client of {many} that trains, against one of {few}, CPU": {
            "ours": ours,
            "peer": peer,
            "ratio": ours / peer,
            "unit": "s",
        }
    }


def bytes_up() -> dict[str, Row]:
    """What a client sends in all its replies, those of the audit too, as arrays and as Flower encodes them: beside its LoRA
    parameters in float16 with the declared vectors, and beside an expert that is whole feed-forward sublayers.
    """
    settings = load_settings("glyphs")
    seed = load_seed(settings.seed_model)
    encoded, sent, vectors = 0, 0, 0
    for kind, audit in AUDIT_ARTIFACTS.items():
        artifacts = reply_artifacts(kind, settings, seed)
        arrays, extra = ({a.name: np.zeros(a.shape, a.dtype) for a in part} for part in (artifacts, audit))
        encoded += recorddict_to_proto(encode_reply(arrays, extra)).ByteSize()
        sent += sum(a.bytes for a in (*artifacts, *audit))
        vectors += sum(a.bytes for a in artifacts if ".lora_" not in a.name)
    lora = 2 * sum(int(np.prod(shape)) for shape in expert_shapes(seed, settings.lora).values())
    layers = [seed.model.get_submodule(path) for path in expert_layers(seed, settings.lora)]
    whole = 2 * sum(p.numel() for layer in layers for p in layer.parameters()) + vectors
    return {
        f"bytes up, {what}, against LoRA and vectors": {
            "ours": ours,
            "peer": lora + vectors,
            "ratio": ours / (lora + vectors),
            "unit": "bytes",
        }
        for what, ours in (("arrays", sent), ("as Flower encodes them", encoded))
    } | {
        "bytes up, against whole FFN experts": {"ours": sent, "peer": whole, "ratio": sent / whole, "unit": "bytes"},
    }


def _run(settings: Settings, out: Path, client_app: str) -> tuple[float, float, int]:
    """Wall seconds and CPU seconds of a run, all processes together, and the largest resident memory of Flower's simulation
    process, in which the server is.
    """
    write_atomically(out / "settings.toml", to_toml(settings))
    with _importable(), _watched("flwr-simulation") as watched:
        begin = time.perf_counter()
        run_flower(settings, out, client_app)
        wall = time.perf_counter() - begin
    return wall, sum(watched.seconds.values()), watched.peak


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


@dataclass
class _Watched:
    """CPU seconds of each child process, and the largest resident memory of one kind of them, in bytes."""

    seconds: dict[int, float] = field(default_factory=dict)
    peak: int = 0


@contextmanager
def _watched(command: str) -> Iterator[_Watched]:
    """While open, what child processes use; memory of those whose command line has this word."""
    watched, done = _Watched(), threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    times = child.cpu_times()
                    watched.seconds[child.pid] = times.user + times.system
                    if any(command in word for word in child.cmdline()):
                        watched.peak = max(watched.peak, child.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        done.set()
        thread.join()
