"""Flower runs on Ray: start a SuperLink of our own, submit, follow, and leave nothing behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metamoe.common.config import Settings
from metamoe.deploy import flower

_CONNECTION = "simulation"


def run_flower(settings: Settings, out: Path, client_app: str = flower.CLIENT_APP) -> None:
    """Run the federation on Ray through Flower; logs and Flower's own files go to ``out/flower``.

    The server reads its settings from ``out/settings.toml``, which must be there.

    Args:
        settings: of the run.
        out: the run folder, absolute.
        client_app: where the clients' app is, as module:attribute.

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
        flower.stop([process.pid])
