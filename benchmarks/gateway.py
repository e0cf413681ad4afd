"""What a client's gateway costs: the same deployed runs, over TLS, with gateways and without."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from metamoe.common.audit.policy import load_policy, policy_text
from metamoe.common.files import write_atomically
from metamoe.common.presets import load_settings, to_toml
from metamoe.deploy import flower, processes
from metamoe.deploy.keys import Federation, make_keys

_SEEDS = (0, 1, 2)
_SETTINGS = ("expert-training.epochs=6", "data.public-samples=8000", "proxies.pool=1000")


def gateway_cost() -> dict[str, dict[str, float | str]]:
    """Wall time of runs of preset glyphs, half its epochs, with three clients in processes of their own; the least of three
    seeds, each with gateways and without.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with TemporaryDirectory() as folder:
        for guarded in (True, False):
            federation = Path(folder, "guarded" if guarded else "direct")
            make_keys(federation, Federation(host="localhost", port=flower.free_port(), clients=3), 1, datetime.now(UTC))
            for file in federation.glob("clients/*/policy.toml"):
                write_atomically(file, policy_text(load_policy(file).model_copy(update={"settings": {"seed": "any"}})))
            with nullcontext() if guarded else patch.object(processes, "_start", _start_direct):
                processes.up(federation, lambda _: None)
            try:
                for seed in _SEEDS:
                    seconds[guarded].append(_run(federation, seed))
            finally:
                processes.down(federation)
    ours, peer = min(seconds[True]), min(seconds[False])
    return {"a deployed run with gateways, against without": {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": "s"}}


def _run(federation: Path, seed: int) -> float:
    settings, out = load_settings("glyphs", [*_SETTINGS, f"seed={seed}"]), federation / "runs" / str(seed)
    out.mkdir(parents=True)
    write_atomically(out / "settings.toml", to_toml(settings))
    begin = time.perf_counter()
    processes.submit(federation, settings, out)
    return time.perf_counter() - begin


_start = processes._start


def _start_direct(
    folder: Path, running: Any, party: str, home: Path, commands: Sequence[tuple[str, list[str], int | None]]
) -> None:
    """A client's processes without its gateway: its SuperNode speaks to the server itself."""
    superlink = next((command[command.index("--superlink") + 1] for name, command, _ in commands if name == "gateway"), "")
    changes = {"--superlink": superlink, "--root-certificates": str(folder / "server" / "ca.crt")}
    direct = []
    for name, command, port in commands:
        if name == "link" and superlink:
            before = ["", *command]
            command = [changes.get(option, part) for option, part in zip(before, command, strict=False)]
            command = [part.replace(" behind-gateway=true", "") for part in command]
        if name != "gateway":
            direct.append((name, command, port))
    _start(folder, running, party, home, direct)
