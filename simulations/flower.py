"""Flower runs on Ray: start a SuperLink of our own, submit, follow, and leave nothing behind."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import tomli_w

from common.config import Settings
from common.errors import RunFailedError, by_code
from common.files import cache_folder, write_atomically

_POLL_SECONDS = 0.5
_STATUS_SECONDS = 15
_START_SECONDS = 60
_STOP_SECONDS = 15
_CONNECTION = "simulation"


def run_flower(settings: Settings, out: Path) -> None:
    """Run the federation on Ray through Flower; logs and Flower's own files go to ``out/flower``.

    The server reads its settings from ``out/settings.toml``, which must be there.

    Args:
        settings: of the run.
        out: the run folder, absolute.

    Raises:
        MetaMoEError: what stopped the server's side, of the kind it had there.
        RunFailedError: Flower itself failed.
    """
    home = out / "flower"
    app = _write_app(home / "metamoe-app")
    error = out / "server" / "error.json"
    environment = _environment(home)
    with _superlink(home, environment) as port:
        connection = {"address": f"127.0.0.1:{port}", "insecure": True}
        config = {"superlink": {"default": _CONNECTION, _CONNECTION: connection}}
        write_atomically(home / "config.toml", tomli_w.dumps(config))
        submitted = _flwr(
            environment,
            home,
            "run",
            str(app),
            _CONNECTION,
            "--run-config",
            f"preset={json.dumps(str(out / 'settings.toml'))} out={json.dumps(str(out))}",
            "--federation-config",
            f"num-supernodes={settings.clients} client-resources-num-cpus=1 "
            f"init-args-num-cpus={settings.compute.parallel_clients}",
        )
        run_id = submitted["run-id"]
        status = _finished(environment, home, run_id, (error, out / "server" / "summary.json"))
    if error.is_file():
        values = json.loads(error.read_text())
        raise by_code(values["code"])(values["message"])
    if status != "finished:completed":
        raise RunFailedError(f"the Flower run ended as {status}; its log is {home / 'superlink.log'}")


def _write_app(folder: Path) -> Path:
    """A Flower app that holds no code: the installed packages are the app, so nothing else can be picked up in their place."""
    pyproject = {
        "project": {"name": "metamoe", "version": version("metamoe-fl"), "license": "Apache-2.0", "dependencies": []},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "metamoe",
                    "components": {"serverapp": "server.app:app", "clientapp": "client.app:app"},
                    "config": {"preset": "glyphs", "set": "", "out": "runs/flower"},
                }
            }
        },
    }
    write_atomically(folder / "pyproject.toml", tomli_w.dumps(pyproject))
    return folder


def _environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "METAMOE_CACHE": str(cache_folder()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


@contextmanager
def _superlink(home: Path, environment: dict[str, str]) -> Iterator[int]:
    """A SuperLink in simulation mode on a free loopback port; everything it starts ends with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "superlink.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            _wait_for(process, port, home)
            yield port
        finally:
            _stop(process)


def _wait_for(process: subprocess.Popen[bytes], port: int, home: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RunFailedError(f"Flower's SuperLink did not start; its log is {home / 'superlink.log'}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and everything below it, Ray's processes too: first asked, then killed."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, _STOP_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, _STOP_SECONDS)


def _finished(environment: dict[str, str], home: Path, run_id: str, signs: Sequence[Path]) -> str:
    """Wait for the end of a run; its status. Flower is asked seldom, as each question costs a second of CPU, unless there
    are signs.
    """
    while True:
        status = str(_flwr(environment, home, "list", _CONNECTION, "--run-id", run_id)["runs"][0]["status"])
        if status.startswith("finished"):
            return status
        deadline = time.monotonic() + _STATUS_SECONDS
        while time.monotonic() < deadline and not any(sign.is_file() for sign in signs):
            time.sleep(_POLL_SECONDS)
        time.sleep(_POLL_SECONDS)


def _flwr(environment: dict[str, str], home: Path, *arguments: str) -> dict:
    """A command of Flower's own, its answer as JSON."""
    done = subprocess.run(
        ["flwr", *arguments, "--format", "json"], cwd=home, env=environment, capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"success": False, "error-message": (done.stderr or done.stdout).strip()}
    if not answer.get("success"):
        raise RunFailedError(f"flwr {arguments[0]} failed: {answer.get('error-message', done.stdout)}")
    return answer
