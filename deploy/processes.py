"""A federation of plain processes on one machine, with the same flags as in containers: TLS, node authentication, and an app
process of its own for every message.

A SuperLink and what starts its ServerApps lie in ``server/``; each client's SuperNode and what starts its ClientApps in
``clients/client-N/``, with the gateway between it and the server. Each of these folders gets Flower's own files, logs, and for
clients ``state/``: what outlives a process. A client that has data of its own has it in ``data/`` there.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError, MetaMoEError, RunFailedError, first_problem
from metamoe.common.files import worked_on, write_atomically, write_json
from metamoe.deploy import flower
from metamoe.deploy.certificates import certificate_problems
from metamoe.deploy.keys import Federation, make_gateway_keys, read_federation

CONNECTION = "federation"
_ONLINE_SECONDS = 90
_GATEWAY_DAYS = 365
_SERVER = "server"
_NODES = "nodes.json"
_KEY_IN_USE = "Public key already in use"


class Started(BaseModel):
    """A process as it was started; pid and time together tell it from a later process of the same number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    created: float

    @property
    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class Running(BaseModel):
    """What was started, by party (``server`` or ``client-N``)."""

    model_config = ConfigDict(extra="forbid")

    processes: dict[str, list[Started]] = {}

    def alive(self, party: str) -> bool:
        """Whether all of a party's processes run: the link, what starts its apps, and a client's gateway."""
        return party in self.processes and all(process.alive for process in self.processes[party])


@dataclass(frozen=True)
class Party:
    """One line of a federation's status."""

    name: str
    running: bool
    node: str
    online: bool


def up(folder: Path, progress: Callable[[str], None]) -> None:
    """Start whatever of a federation does not run, register the nodes that are not, and wait until all are online.

    Args:
        folder: the federation's, from :func:`metamoe.deploy.keys.make_keys`.
        progress: told what is being waited for.

    Raises:
        InputFileError: a certificate cannot be used; Flower itself would only say that nobody answers.
        RunFailedError: something did not start, with its log.
    """
    federation, running = read_federation(folder), _running(folder)
    for file, problem in certificate_problems(folder, federation, datetime.now(UTC)).items():
        if problem:
            raise InputFileError(f"{file} {problem}")
    if not _answers(folder, running):
        progress("starting the server")
        _end(running, _SERVER)
        _start_server(folder, federation, running)
    register_clients(folder, progress)
    for number, name in enumerate(federation.names):
        # Without its key it is a client from elsewhere.
        if (folder / "clients" / name / "node.key").exists() and not running.alive(name):
            _end(running, name)
            _wait_gone(folder, name, progress)
            progress(f"starting {name}")
            _start_client(folder, federation, running, number)
    _wait_online(folder, list(running.processes), progress)


def down(folder: Path) -> list[str]:
    """Stop every process of a federation; the parties that ran. Registrations and states stay."""
    running = _running(folder)
    # Clients first, so that none looks for a server that is gone.
    parties = [party for party in reversed(running.processes) if any(p.alive for p in running.processes[party])]
    for party in list(running.processes)[::-1]:
        _end(running, party)
    _save(folder, running)
    return parties


def status(folder: Path) -> list[Party]:
    """What runs, and which nodes the server sees."""
    federation, running = read_federation(folder), _running(folder)
    serving, nodes = running.alive(_SERVER), registered(folder)
    online = online_nodes(folder) if serving else set()
    return [
        Party(_SERVER, serving, "", serving),
        *(Party(name, running.alive(name), nodes.get(name, ""), nodes.get(name) in online) for name in federation.names),
    ]


def register(folder: Path, public_key: Path) -> str:
    """Let the node with this public key into the federation; its id.

    Raises:
        RunFailedError: the server does not answer, or refuses the key.
    """
    try:
        answer = flower.flwr(_connected(folder), "supernode", "register", str(public_key.absolute()), CONNECTION)
    except RunFailedError as error:
        if _KEY_IN_USE in str(error):
            raise RunFailedError(f"the key {public_key} is registered already; one key is one node") from error
        raise
    return str(answer["node-id"])


def register_clients(folder: Path, progress: Callable[[str], None]) -> list[str]:
    """Let every client whose public key lies in the folder into the federation; the names of those that were not in it.

    Raises:
        RunFailedError: as :func:`register`.
    """
    nodes, new = registered(folder), []
    for name in read_federation(folder).names:
        if name not in nodes and (public := folder / "clients" / name / "node.pub").exists():
            progress(f"registering {name}")
            nodes[name] = register(folder, public)
            write_json(_home(folder) / _NODES, nodes)
            new.append(name)
    return new


def registered(folder: Path) -> dict[str, str]:
    """The ids under which clients are registered, by their names."""
    file = _home(folder) / _NODES
    try:
        return TypeAdapter(dict[str, str]).validate_json(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValidationError) as error:
        raise InputFileError(f"{file} cannot be read: {error}") from error


def with_names(folder: Path, text: str) -> str:
    """A message of the server's, which knows nodes by their ids until they say which client they are."""
    for name, node in registered(folder).items():
        text = text.replace(f"node {node}", name)
    return text


def submit(folder: Path, settings: Settings, out: Path) -> None:
    """Run the stages over a federation that is up; ``out/settings.toml`` must be there. A run that stopped there goes on, and
    one that has not is followed.

    Raises:
        InvalidSettingError: the settings are for another number of clients.
        MetaMoEError: what stopped the run.
    """
    federation = read_federation(folder)
    if settings.clients != federation.clients:
        raise InvalidSettingError(
            f"clients = {settings.clients}, but the federation in {folder} has {federation.clients}; set clients to that"
        )
    home = _connected(folder)
    going_on = flower.goes_on(home, CONNECTION, out)
    try:
        if going_on and worked_on(out / "server"):
            flower.follow(home, CONNECTION, out)
            return
        if going_on:
            # Flower takes it for running, but the process that did is gone.
            flower.end(home, CONNECTION, out)
        flower.run(home, CONNECTION, out, audit_keys=folder / _SERVER)
    except MetaMoEError as error:
        raise type(error)(with_names(folder, str(error))) from error


def _start_server(folder: Path, federation: Federation, running: Running) -> None:
    home, own = _home(folder), folder / _SERVER
    address = _address(federation)
    secret = ["--superexec-auth-secret-file", str(own / "superexec.secret")]
    link = [
        "flower-superlink",
        "--isolation",
        "process",
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]
    link += ["--database", str(home / "superlink.db"), "--host", "127.0.0.1", "--port", str(federation.port), *secret]
    link += ["--ssl-certfile", str(own / "server.crt"), "--ssl-keyfile", str(own / "server.key")]
    link += ["--ssl-ca-certfile", str(own / "ca.crt")]
    apps = ["flower-superexec", "--runtime-api-address", address, "--root-certificates", str(own / "ca.crt"), *secret]
    _start(folder, running, _SERVER, home, [("link", link, federation.port), ("apps", apps, None)])


def _start_client(folder: Path, federation: Federation, running: Running, number: int) -> None:
    name = federation.names[number]
    own = folder / "clients" / name
    home, port, gate = own / "flower", flower.free_port(), flower.free_port()
    if not (own / "gateway.key").exists():
        make_gateway_keys(own, _GATEWAY_DAYS, datetime.now(UTC))
    # The client's only way out.
    way = ["metamoe", "--quiet", "gateway", str(own), "--superlink", f"localhost:{federation.port}", "--port", str(gate)]
    runtime = ["--ssl-certfile", str(own / "runtime.crt"), "--ssl-keyfile", str(own / "runtime.key")]
    secret = ["--superexec-auth-secret-file", str(own / "superexec.secret")]
    node = ["flower-supernode", "--isolation", "process", "--superlink", f"localhost:{gate}"]
    node += ["--root-certificates", str(own / "gateway.crt"), "--auth-supernode-private-key", str(own / "node.key")]
    config = f'partition-id={number} state-dir="{own / "state"}" behind-gateway=true'
    config += f' policy="{own / "policy.toml"}"'
    if (data := own / "data").is_dir():
        config += f' data-dir="{data}"'
    node += ["--node-config", config]
    node += ["--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile", str(own / "runtime.crt"), *runtime, *secret]
    apps = ["flower-superexec", "--runtime-api-address", f"127.0.0.1:{port}"]
    apps += ["--root-certificates", str(own / "runtime.crt"), *secret]
    _start(folder, running, name, home, [("gateway", way, gate), ("link", node, port), ("apps", apps, None)])


def _start(
    folder: Path, running: Running, party: str, home: Path, commands: Sequence[tuple[str, list[str], int | None]]
) -> None:
    """Start a party's processes, each by its name in the folder's logs, its command, and the port on which it must listen
    before the next is started; and note them down at once.
    """
    home.mkdir(parents=True, exist_ok=True)
    running.processes[party] = []
    for name, command, port in commands:
        log = home.with_name(f"{name}.log")
        process = flower.start(command, home, log)
        running.processes[party].append(_started(process.pid))
        _save(folder, running)
        if port is not None:
            flower.wait_for(process, port, log)


def _started(pid: int) -> Started:
    try:
        return Started(pid=pid, created=psutil.Process(pid).create_time())
    except psutil.NoSuchProcess as error:
        raise RunFailedError(f"a process of Flower's ended at once (pid {pid})") from error


def _end(running: Running, party: str) -> None:
    """Stop a party's processes, the last first: a SuperNode says goodbye to the server through its gateway."""
    for process in running.processes.pop(party, [])[::-1]:
        if process.alive:
            flower.stop([process.pid])


def _answers(folder: Path, running: Running) -> bool:
    """Whether the server runs. One that was killed just now may still be there, so it has to answer too.

    Raises:
        RunFailedError: it runs and does not answer.
    """
    deadline = time.monotonic() + _ONLINE_SECONDS
    while running.alive(_SERVER):
        try:
            online_nodes(folder)
            return True
        except RunFailedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
    return False


def _wait_gone(folder: Path, name: str, progress: Callable[[str], None]) -> None:
    """Wait until the server no longer takes a node for online whose process ended without a word, which takes a minute: before,
    it refuses another process with the same key.
    """
    deadline, node = time.monotonic() + _ONLINE_SECONDS, registered(folder).get(name)
    while node in online_nodes(folder) and time.monotonic() < deadline:
        progress(f"waiting until the server sees that {name} ended")
        time.sleep(1)


def _wait_online(folder: Path, started: Sequence[str], progress: Callable[[str], None]) -> None:
    deadline, nodes = time.monotonic() + _ONLINE_SECONDS, registered(folder)
    while offline := sorted({name for name, node in nodes.items() if node not in online_nodes(folder)}.intersection(started)):
        progress(f"waiting for {', '.join(offline)}")
        if time.monotonic() > deadline:
            logs = folder / "clients" / offline[0] / "link.log"
            raise RunFailedError(f"{', '.join(offline)} did not connect within {_ONLINE_SECONDS} s; see {logs}")
        time.sleep(1)


def online_nodes(folder: Path) -> set[str]:
    """Ids of the nodes that the server sees.

    Raises:
        RunFailedError: the server does not answer.
    """
    nodes = flower.flwr(_connected(folder), "supernode", "list", CONNECTION)["nodes"]
    return {str(node["node-id"]) for node in nodes if node["status"] == "online"}


def _connected(folder: Path) -> Path:
    """Flower's own files of the server's side, with how to reach the server on this machine."""
    connection = {
        "address": _address(read_federation(folder)),
        "root-certificates": str(folder / _SERVER / "ca.crt"),
    }
    flower.write_connection(_home(folder), CONNECTION, connection)
    return _home(folder)


def _address(federation: Federation) -> str:
    return f"127.0.0.1:{federation.port}"


def _home(folder: Path) -> Path:
    """Flower's own files of the server's side."""
    return folder / _SERVER / "flower"


def _running(folder: Path) -> Running:
    file = folder / "running.json"
    try:
        return Running.model_validate_json(file.read_text()) if file.is_file() else Running()
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        raise InputFileError(f"{file}: {first_problem(error)}") from error


def _save(folder: Path, running: Running) -> None:
    write_atomically(folder / "running.json", running.model_dump_json(indent=2) + "\n")
