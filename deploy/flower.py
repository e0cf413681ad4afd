"""Flower's own commands: the environment they run in, the app they are given, and a run followed to its end."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from metamoe.common.bundle import CLIENT_APP, write_app
from metamoe.common.errors import RunFailedError, by_code
from metamoe.common.files import cache_folder, write_atomically

_COLOURS = ("CLICOLOR_FORCE", "FORCE_COLOR", "TTY_COMPATIBLE")
_POLL_SECONDS = 0.5
_STATUS_SECONDS = 15
_START_SECONDS = 60
_STOP_SECONDS = 15
_ROUNDS = 5
_QUESTIONS = 4
_RUN_ID = "flower-run"


def environment(home: Path) -> dict[str, str]:
    """This process's environment, with Flower's own files in ``home``, and Flower neither calling home nor installing, nor
    colouring the JSON that it answers, as it would under Jupyter.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _COLOURS}
    return inherited | {
        "FLWR_HOME": str(home),
        "METAMOE_CACHE": str(cache_folder()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def write_connection(home: Path, name: str, connection: Mapping[str, str | bool]) -> None:
    """Tell Flower's commands, in ``home``, how to reach a SuperLink."""
    write_atomically(home / "config.toml", tomli_w.dumps({"superlink": {"default": name, name: dict(connection)}}))


def run(
    home: Path, connection: str, out: Path, *options: str, audit_keys: Path | None = None, client_app: str = CLIENT_APP
) -> None:
    """Submit the app, so that it goes on with whatever run is in the folder, and follow it to its end.

    Args:
        home: Flower's own files; the connection is written there.
        connection: its name.
        out: the run folder, absolute, with ``settings.toml`` in it.
        options: further ones of ``flwr run``.
        audit_keys: folder of the key that signs the server's ledger; None for one of this run alone.
        client_app: where the clients' app is, as module:attribute.

    Raises:
        MetaMoEError: what stopped the server's side, of the kind it had there.
        RunFailedError: Flower itself failed.
    """
    # What ended it before is not what may end it now.
    (out / "server" / "error.json").unlink(missing_ok=True)
    config = f"preset={json.dumps(str(out / 'settings.toml'))} out={json.dumps(str(out))} resume=true"
    config += f" audit-keys={json.dumps(str(audit_keys))}" if audit_keys else ""
    submitted = flwr(
        home, "run", str(write_app(home / "metamoe-app", client_app)), connection, "--run-config", config, *options
    )
    write_atomically(out / "server" / _RUN_ID, str(submitted["run-id"]))
    follow(home, connection, out)


def goes_on(home: Path, connection: str, out: Path) -> bool:
    """Whether Flower says that its run for this run folder is going on.

    Raises:
        RunFailedError: Flower does not answer.
    """
    file = out / "server" / _RUN_ID
    if not file.is_file():
        return False
    runs = flwr(home, "list", connection)["runs"]
    return any(str(run["run-id"]) == file.read_text() and not run["status"].startswith("finished") for run in runs)


def end(home: Path, connection: str, out: Path) -> None:
    """End the Flower run for this run folder.

    Raises:
        RunFailedError: Flower does not.
    """
    flwr(home, "stop", (out / "server" / _RUN_ID).read_text(), connection)


def follow(home: Path, connection: str, out: Path) -> None:
    """Follow the Flower run for this run folder to its end.

    Raises:
        MetaMoEError: what stopped the server's side, of the kind it had there.
        RunFailedError: Flower itself failed.
    """
    error = out / "server" / "error.json"
    run_id = (out / "server" / _RUN_ID).read_text()
    status = _finished(home, connection, run_id, (error, out / "server" / "summary.json"))
    if error.is_file():
        values = json.loads(error.read_text())
        raise by_code(values["code"])(values["message"])
    if status != "finished:completed":
        raise RunFailedError(f"the Flower run ended as {status}; Flower's logs say why")


def flwr(home: Path, *arguments: str) -> dict[str, Any]:
    """A command of Flower's own, its answer as JSON.

    Raises:
        RunFailedError: it failed; the message is Flower's.
    """
    command = ["flwr", *arguments, "--format", "json"]
    done = subprocess.run(command, cwd=home, env=environment(home), capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {"success": False, "error-message": (done.stderr or done.stdout).strip()}
    if not answer.get("success"):
        why = answer.get("error-message") or f"without a reason, with exit code {done.returncode}"
        raise RunFailedError(f"flwr {arguments[0]} failed: {why}")
    return answer


def start(command: Sequence[str], home: Path, log: Path) -> subprocess.Popen[bytes]:
    """A process of its own session, in ``home``, that writes to ``log``."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=home,
            env=environment(home),
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until a process listens on a port of the loopback.

    Raises:
        RunFailedError: it ended before, or does not within a minute.
    """
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RunFailedError(f"Flower did not start to listen on port {port}; its log is {log}")


def left_running(home: Path) -> list[int]:
    """Processes that were started with their Flower files in ``home``, by whoever: those of a command that was killed too."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home) and process.pid != os.getpid():
                found.append(process.pid)
    return found


def stop_all(home: Path) -> None:
    """End whatever was started with its Flower files in ``home``, and what that starts while it is ended."""
    for _ in range(_ROUNDS):
        if not (left := left_running(home)):
            return
        stop(left)


def stop(pids: Sequence[int]) -> None:
    """End processes and everything below them, Ray's too: first asked, then killed."""
    family = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            family += [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, _STOP_SECONDS)
    for member in alive:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, _STOP_SECONDS)


def _finished(home: Path, connection: str, run_id: str, signs: Sequence[Path]) -> str:
    """Wait for the end of a run; its status. Flower is asked seldom, as each question costs a second of CPU, unless there
    are signs. One question that fails says nothing of the run: on a busy machine it may have come too late.
    """
    failed = 0
    while True:
        try:
            status = str(flwr(home, "list", connection, "--run-id", run_id)["runs"][0]["status"])
            failed = 0
        except RunFailedError:
            failed += 1
            if failed == _QUESTIONS:
                raise
            status = ""
        if status.startswith("finished"):
            return status
        deadline = time.monotonic() + _STATUS_SECONDS
        while time.monotonic() < deadline and not any(sign.is_file() for sign in signs):
            time.sleep(_POLL_SECONDS)
        time.sleep(_POLL_SECONDS)
