"""How long the command takes until a client begins."""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

_BARS = {"local": 5.0, "ray": 25.0}
_POLL_SECONDS = 0.05


def start_up(repeats: int = 3) -> dict[str, dict[str, float | str]]:
    """Seconds on the clock from the command ``metamoe simulate --preset glyphs`` to the first client's record of its first
    request, which it writes before it computes, with each backend and beside its bar.

    Args:
        repeats: starts of each, of which the fastest counts. What is in the cache after the first is not made again.

    Raises:
        RuntimeError: the command has ended before that.
    """
    rows: dict[str, dict[str, float | str]] = {}
    for backend, bar in _BARS.items():
        seconds = min(_until_first_request(backend) for _ in range(repeats))
        rows[f"start-up with backend {backend}, wall"] = {"ours": seconds, "peer": bar, "ratio": seconds / bar, "unit": "s"}
    return rows


def _until_first_request(backend: str) -> float:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [Path(sys.executable).with_name("metamoe"), "simulate", "--backend", backend, "--out", out]
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not any((out / "clients" / "audit").glob("*/*")):
                if process.poll() is not None:
                    raise RuntimeError(f"metamoe simulate --backend {backend} has ended with exit code {process.returncode}")
                time.sleep(_POLL_SECONDS)
            return time.perf_counter() - begin
        finally:
            process.terminate()
            process.wait()
