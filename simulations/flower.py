"""Flower runs on Ray: start a SuperLink of our own, submit, follow, and leave nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metamoe.common.bundle import CLIENT_APP
from metamoe.common.config import Settings
from metamoe.deploy import flower
from metamoe.simulations.prepare import Placement

_CONNECTION = "simulation"


def run_flower(settings: Settings, out: Path, client_app: str = CLIENT_APP, placement: Placement | None = None) -> None:
    """Run the federation on Ray through Flower; logs and Flower's own files go to ``out/flower``.

    The server reads its settings from ``out/settings.toml``, which must be there.

    Args:
        settings: of the run.
        out: the run folder, absolute.
        client_app: where the clients' app is, as module:attribute.
        placement: what share of which GPUs each client gets; None for none.

    Raises:
        MetaMoEError: what stopped the server's side, of the kind it had there.
        RunFailedError: Flower itself failed.
    """
    home = out / "flower"
    home.mkdir(parents=True, exist_ok=True)
    with _superlink(home) as port:
        flower.write_connection(home, _CONNECTION, {"address": f"127.0.0.1:{port}", "insecure": True})
        size = (
            f"num-supernodes={settings.clients} client-resources-num-cpus=1 "
            f"init-args-num-cpus={settings.compute.parallel_clients}"
        )
        if placement is not None and placement.share:
            # Ray hides every GPU from an actor without a share.
            size += f" client-resources-num-gpus={placement.share} init-args-num-gpus={placement.cards}"
        flower.run(home, _CONNECTION, out, "--federation-config", size, client_app=client_app)


@contextmanager
def _superlink(home: Path) -> Iterator[int]:
    """A SuperLink in simulation mode on a free loopback port; everything it starts ends with it."""
    port, log = flower.free_port(), home / "superlink.log"
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port)]
    process = flower.start(command, home, log)
    try:
        flower.wait_for(process, port, log)
        yield port
    finally:
        # Its own first, in peace; then what of Ray's has lost its parent.
        flower.stop([process.pid])
        flower.stop_all(home)
