"""``make bench``: ratios taken side by side in one run, as a table and in bench.json.

``python -m benchmarks NAME ...`` runs a part: selection, forward, compile, generation, serving, bytes, start, folder, audit,
gateway, scale. ``gpu`` is for a machine with a GPU, and never among all parts: eight minutes, in gpu.json; ``gpu-dry`` tries
its programme on a CPU at reduced shapes.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.audit import audit_cost
from benchmarks.folder import folder_cost
from benchmarks.forward import compiled_cost, forward_cost
from benchmarks.gateway import gateway_cost
from benchmarks.generation import generation_cost, serving_cost
from benchmarks.gpu import REAL, REDUCED, gpu_cost
from benchmarks.scale import bytes_up, many_clients, more_clients
from benchmarks.selection import imagenet_cost, selection_cost
from benchmarks.start import start_up
from metamoe.common.files import write_json

Rows = dict[str, dict[str, float | str]]
PARTS: dict[str, list[tuple[str, Callable[[], Rows]]]] = {
    "selection": [
        ("selection, 3,000 items", lambda: selection_cost(3_000, 30)),
        ("selection, 20,000 items", lambda: selection_cost(20_000, 2)),
        ("selection, as many items as ImageNet has", imagenet_cost),
    ],
    "forward": [("forward passes", forward_cost)],
    "compile": [("forward passes, compiled", compiled_cost)],
    "generation": [("texts that go on, a few minutes", generation_cost)],
    "serving": [("requests that a server answers, a few minutes", serving_cost)],
    "bytes": [("bytes that a client sends", bytes_up)],
    "start": [("start-up", start_up)],
    "folder": [("100,000 pictures, some minutes", folder_cost)],
    "audit": [("a run of preset glyphs, a few minutes", audit_cost)],
    "gateway": [("deployed runs with gateways and without, some ten minutes", gateway_cost)],
    "scale": [("1,000 clients, some minutes", many_clients), ("1, 10 and 100 clients that train, some minutes", more_clients)],
}


def on_gpu(dry: bool) -> int:
    """The programme for a GPU; without one nothing is measured, unless it is only to be tried."""
    if not dry and not torch.cuda.is_available():
        sys.stderr.write("no GPU is here, nothing was measured; 'python -m benchmarks gpu-dry' tries the programme on a CPU\n")
        return 1
    device = torch.device("cpu" if dry else "cuda:0")
    show(gpu_cost(device, REDUCED if dry else REAL, Path("gpu-dry.json" if dry else "gpu.json")))
    return 0


def show(rows: Rows) -> None:
    """A table of what was measured."""
    table = Table("what", "ours", "against", "ratio", "unit")
    for what, row in rows.items():
        table.add_row(what, f"{row['ours']:,.3f}", f"{row['peer']:,.3f}", f"{row['ratio']:.4f}", str(row["unit"]))
    Console().print(table)


def main(names: list[str]) -> int:
    """Run the parts; all of them without names. Results of other parts stay in bench.json."""
    if names in (["gpu"], ["gpu-dry"]):
        return on_gpu(dry=names == ["gpu-dry"])
    if unknown := [name for name in names if name not in PARTS]:
        sys.stderr.write(f"no benchmark is called {unknown[0]!r}; there are {', '.join(PARTS)}, and by itself gpu\n")
        return 2
    console, file = Console(), Path("bench.json")
    results: Rows = json.loads(file.read_text()) if names and file.is_file() else {}
    done: Rows = {}
    for name in names or PARTS:
        for label, run in PARTS[name]:
            with console.status(label):
                rows = run()
            results |= rows
            done |= rows
            write_json(file, results)
    show(done)
    return 0


sys.exit(main(sys.argv[1:]))
