"""A federation of separate processes, with TLS and node authentication: the simulation's result, and who is refused."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w

from metamoe.audit.verification import verify
from metamoe.changes import begin, overview
from metamoe.common.audit.entries import Intent
from metamoe.common.audit.keys import read_public
from metamoe.common.audit.policy import load_policy, policy_text
from metamoe.common.audit.reconcile import reconcile
from metamoe.common.audit.verify import check_ledger
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_public
from metamoe.common.errors import InputFileError, InvalidSettingError, RunFailedError
from metamoe.common.files import cache_folder, read_json, write_atomically
from metamoe.common.model.artifact import load_model
from metamoe.common.presets import changed, load_settings, to_toml, validated
from metamoe.deploy import flower
from metamoe.deploy.keys import Federation, make_keys, read_federation
from metamoe.deploy.processes import Running, _start_server, down, register, status, up
from metamoe.server.changes import Change
from metamoe.simulations.local import run_local

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
SMALL_GLYPHS = (
    *("data.private-samples=60", "data.public-samples=300", "proxies.count=20", "proxies.pool=100"),
    *("expert-training.epochs=1", "router-training.epochs=1", "clients=1"),
)
# Bytes a run of one client, about twice what was seen: 135 KB of requests for objects, 360 bytes a second of polling.
FRAMING = 300_000


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three clients and a server, up."""
    folder = tmp_path_factory.mktemp("deployed") / "federation"
    make_keys(folder, Federation(host="localhost", port=flower.free_port(), clients=3), 30, datetime.now(UTC))
    let_choose(folder, "seed")
    try:
        up(folder, lambda _: None)
        yield folder
    finally:
        down(folder)


def let_choose(federation: Path, *settings: str) -> None:
    """Each client's owner lets the server choose these, as often as these tests do."""
    for file in federation.glob("clients/*/policy.toml"):
        policy = load_policy(file)
        limits = policy.limits.model_copy(update={"max_distinct_statistics": 20})
        chosen = policy.model_copy(update={"settings": dict.fromkeys(settings, "any"), "limits": limits})
        write_atomically(file, policy_text(chosen))


def start(federation: Path, settings: Settings, out: Path) -> subprocess.Popen[str]:
    preset = out.with_suffix(".toml")
    write_atomically(preset, to_toml(settings))
    command = [str(BIN / "metamoe"), "deploy", "run", str(federation), "--preset", str(preset), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_separate_processes_give_the_simulation_s_model(federation: Path, small: Settings, tmp_path: Path) -> None:
    run = start(federation, small, tmp_path / "deployed")
    shown, _ = run.communicate(timeout=400)
    assert run.returncode == 0, shown
    server = check_ledger(tmp_path / "deployed" / "server" / "audit", read_public(federation / "server" / "audit.pub"))
    assert server.findings == []
    for number in range(3):
        client = check_ledger(federation / "clients" / f"client-{number}" / "state" / "audit" / f"client-{number}")
        assert client.findings == []
        assert reconcile(client, server) == []
        # The owner's gateway saw the same leave, array by array.
        gateway = check_ledger(federation / "clients" / f"client-{number}" / "gateway" / "audit")
        assert gateway.findings == []
        sent = [(entry.stage, entry.message, entry.arrays) for entry in client.of(Intent)]
        assert [(entry.stage, entry.message, entry.arrays) for entry in gateway.of(Intent)] == sent
        assert list(client.policies.values()) == [load_policy(federation / "clients" / f"client-{number}" / "policy.toml")]
    # In its own place, and with a key that is not in the federation's folder, a run finds what belongs to it.
    assert verify(tmp_path / "deployed").fine
    names = ["client-0", "client-1", "client-2"]
    assert [ledger.name for ledger in verify(federation).ledgers] == [*names, *(f"gateway of {name}" for name in names)]
    run_local(small, tmp_path / "local")
    assert (tmp_path / "deployed" / "proxies.json").read_bytes() == (tmp_path / "local" / "proxies.json").read_bytes()
    models = [load_model(tmp_path / name / "model").model for name in ("deployed", "local")]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        np.testing.assert_allclose(tensor.float(), states[1][name].float(), rtol=1e-5, atol=1e-7, err_msg=name)
    for number, name in enumerate(small.client_names):
        state = federation / "clients" / f"client-{number}" / "state" / name
        assert load_model(state / "model").manifest.experts == small.client_names
    # One client is taken out: its node is up, and says nothing; the others receive the model, and are asked nothing else.
    begun = begin(tmp_path / "deployed", Change("remove", "greek"), tmp_path / "less")
    assert begun.deployed
    command = [BIN / "metamoe", "deploy", "resume", str(federation), str(tmp_path / "less")]
    less = subprocess.run(command, capture_output=True, text=True, check=False)
    assert less.returncode == 0, less.stderr
    assert load_model(tmp_path / "less" / "model").manifest.experts == ["digits", "arrows"]
    for number, stages in enumerate([["profile", "deliver"], [], ["profile", "deliver"]]):
        client = check_ledger(federation / "clients" / f"client-{number}" / "state" / "audit" / f"client-{number}")
        assert [intent.stage for intent in client.of(Intent, overview(tmp_path / "less").changes[0]["run"])] == stages
    assert verify(federation).fine


def pids(federation: Path, party: str) -> list[int]:
    processes = Running.model_validate_json((federation / "running.json").read_text()).processes[party]
    return [process.pid for process in processes]


def stop(federation: Path, party: str) -> None:
    """End a party's processes so that its SuperNode says goodbye, through its gateway."""
    for pid in pids(federation, party)[::-1]:
        flower.stop([pid])


def kill(federation: Path, party: str) -> None:
    """End all of a party's processes at once: Flower notices after a minute."""
    for pid in pids(federation, party):
        for member in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            member.kill()


def test_a_run_ends_at_the_quorum_and_a_client_that_is_back_joins_the_next(
    federation: Path, small: Settings, tmp_path: Path
) -> None:
    settings = validated(small.model_dump() | {"seed": 7, "quorum": 2, "compute": {"rejoin-timeout": 0}})
    out, experts = tmp_path / "broken", federation / "clients" / "client-0" / "state" / "digits" / "experts"
    earlier = set(experts.glob("*/proxies.json"))
    run = start(federation, settings, out)
    # As soon as the server asks for experts.
    wait_until(lambda: (out / "proxies.json").is_file())
    kill(federation, "client-1")
    shown, _ = run.communicate(timeout=400)
    assert run.returncode == 0, shown
    assert "missing: greek (expert): client greek could not answer 'expert'" in shown
    assert load_model(out / "model").manifest.experts == ["digits", "arrows"]
    assert [party.name for party in status(federation) if not party.running] == ["client-1"]

    up(federation, lambda _: None)
    assert all(party.online for party in status(federation))
    (trained,) = set(experts.glob("*/proxies.json")) - earlier
    written = trained.stat().st_mtime_ns
    run = start(federation, settings, tmp_path / "again")
    shown, _ = run.communicate(timeout=400)
    assert run.returncode == 0, shown
    assert set(experts.glob("*/proxies.json")) - earlier == {trained}
    assert trained.stat().st_mtime_ns == written
    assert "missing" not in shown
    assert load_model(tmp_path / "again" / "model").manifest.experts == settings.client_names


def test_a_run_waits_for_a_client_that_dropped_out(federation: Path, small: Settings, tmp_path: Path) -> None:
    settings = changed(small, ["seed=8"])
    out = tmp_path / "waits"
    run = start(federation, settings, out)
    wait_until(lambda: (out / "proxies.json").is_file())
    # It says goodbye, so that Flower takes it for gone at once.
    stop(federation, "client-2")
    assert [party.name for party in status(federation) if not party.online] == ["client-2"]
    up(federation, lambda _: None)
    shown, _ = run.communicate(timeout=400)
    assert run.returncode == 0, shown
    assert "missing" not in shown
    assert load_model(out / "model").manifest.experts == settings.client_names


@contextmanager
def started_with(federation: Path, party: str, variables: dict[str, str]) -> Iterator[None]:
    """A party that runs with other environment variables for a while."""
    stop(federation, party)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        up(federation, lambda _: None)
    yield
    stop(federation, party)
    up(federation, lambda _: None)


def test_a_client_with_another_version_or_other_public_data_is_refused_by_name(
    federation: Path, small: Settings, tmp_path: Path
) -> None:
    stamp = tmp_path / "metamoe_fl-9.9.9.dist-info"
    stamp.mkdir()
    (stamp / "METADATA").write_text("Metadata-Version: 2.1\nName: metamoe-fl\nVersion: 9.9.9\n")
    # The built-in public set as it was made before, in another order.
    public = load_public(small.data.model_copy(update={"public_samples": 0}))
    cached = Path(public.cache_files[0]["filename"]).parent
    public.select(range(len(public))[::-1]).save_to_disk(tmp_path / cached.relative_to(cache_folder()))
    settings = validated(small.model_dump() | {"quorum": 1})
    with (
        started_with(federation, "client-1", {"PYTHONPATH": str(tmp_path)}),
        started_with(federation, "client-2", {"METAMOE_CACHE": str(tmp_path)}),
    ):
        run = start(federation, settings, tmp_path / "alone")
        shown, _ = run.communicate(timeout=400)
    assert run.returncode == 0, shown
    assert "client-1 could not answer 'profile': VersionMismatchError: Client and server run different versions" in shown
    assert "client-2 could not answer 'profile': PublicDataMismatchError: Client and server hold different public sets" in shown
    assert load_model(tmp_path / "alone" / "model").manifest.experts == ["digits"]
    # Another version gets no further than the gateway, which is of that version too.
    assert "of MetaMoE-FL '0.1.0', this gateway is '9.9.9'" in (federation / "clients" / "client-1" / "gateway.log").read_text()
    log = federation / "clients" / "client-2" / "state" / "client-2.log"
    assert "the server's public set is" in log.read_text()


def refused(federation: Path, *options: str) -> str:
    """What a SuperNode says that is started with these options against the federation's server, and must give up."""
    port = read_federation(federation).port
    command = [
        str(BIN / "flower-supernode"),
        "--isolation",
        "process",
        "--superlink",
        f"localhost:{port}",
        "--max-retries",
        "1",
    ]
    command += ["--port", str(flower.free_port()), *options]
    home = federation / "stranger"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        command, cwd=home, env=flower.environment(home), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert sum(party.online for party in status(federation)) == 1 + 3
    return done.stdout + done.stderr


def test_a_node_with_an_unregistered_key_or_none_is_refused(federation: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other", Federation(host="localhost", port=8000, clients=1), 30, datetime.now(UTC))
    trusting = ("--root-certificates", str(federation / "server" / "ca.crt"))
    key = str(tmp_path / "other" / "clients" / "client-0" / "node.key")
    assert "Failed to activate" in refused(federation, *trusting, "--auth-supernode-private-key", key)
    assert "must be registered" in refused(federation, *trusting)


def test_a_node_without_tls_is_refused_and_refuses_another_authority(federation: Path, tmp_path: Path) -> None:
    assert "Failed to initialize the connection" in refused(federation, "--insecure")
    make_keys(tmp_path / "other", Federation(host="localhost", port=8000, clients=1), 30, datetime.now(UTC))
    shown = refused(federation, "--root-certificates", str(tmp_path / "other" / "server" / "ca.crt"))
    assert "CERTIFICATE_VERIFY_FAILED" in shown


def test_an_expired_certificate_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    make_keys(folder, Federation(host="localhost", port=8000, clients=1), 10, datetime.now(UTC) - timedelta(days=20))
    with pytest.raises(InputFileError, match=r"server\.crt expired on .* make new keys"):
        up(folder, lambda _: None)
    assert not (folder / "running.json").exists()


def test_one_key_is_one_node(federation: Path) -> None:
    with pytest.raises(RunFailedError, match="registered already"):
        register(federation, federation / "clients" / "client-0" / "node.pub")


def test_settings_for_another_number_of_clients_are_refused(federation: Path, small: Settings, tmp_path: Path) -> None:
    run = start(federation, small.model_copy(update={"clients": 4}), tmp_path / "four")
    shown, _ = run.communicate(timeout=60)
    assert run.returncode == InvalidSettingError.exit_code
    assert "clients = 4, but the federation" in shown


class Counter(threading.Thread):
    """A TCP forwarder that counts the bytes of both directions, of a gateway's connections: commands come this way too."""

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.target = self.listener.getsockname()[1], target
        self.up = self.down = 0

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            counted = self._is_gateway(client.getpeername()[1])
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._forward, args=(source, sink, direction, counted), daemon=True).start()

    @staticmethod
    def _is_gateway(port: int) -> bool:
        owners = (c.pid for c in psutil.net_connections("tcp") if c.pid and c.laddr and c.laddr.port == port)
        return any("gateway" in psutil.Process(pid).cmdline() for pid in owners)

    def _forward(self, source: socket.socket, sink: socket.socket, direction: str, counted: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if counted:
                    setattr(self, direction, getattr(self, direction) + len(data))
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_the_bytes_on_the_wire_are_those_of_the_ledger_and_framing(tmp_path: Path) -> None:
    """What leaves a client's sockets, counted under TLS, against what its ledger says it sent.

    Framing is what Flower adds: requests for each object of a message, heartbeats, polling. It is the same for experts of twice
    the size, so what a larger expert adds on the wire is its own bytes.
    """
    folder = tmp_path / "federation"
    server = Federation(host="localhost", port=flower.free_port(), clients=1)
    make_keys(folder, server, 30, datetime.now(UTC))
    let_choose(folder, "lora.rank")
    counter = Counter(server.port)
    counter.start()
    on_the_wire = []
    try:
        _start_server(folder, server, Running())
        # The client is told another port, where the counter listens.
        told = server.model_copy(update={"port": counter.port})
        write_atomically(folder / "federation.toml", tomli_w.dumps(told.model_dump()))
        up(folder, lambda _: None)
        for rank in (16, 64):
            before = counter.up
            run = start(folder, load_settings("glyphs", [*SMALL_GLYPHS, f"lora.rank={rank}"]), tmp_path / f"run-{rank}")
            shown, _ = run.communicate(timeout=400)
            assert run.returncode == 0, shown
            on_the_wire.append(counter.up - before)
    finally:
        down(folder)
        counter.listener.close()
    own = folder / "clients" / "client-0"
    # To the byte: what the gateway counted, and what went over the wire. The server's last word, that a connection ends,
    # comes when the gateway reads no more.
    traffic = read_json(own / "gateway" / "traffic.json")
    assert traffic["sent"] == counter.up
    assert 0 <= counter.down - traffic["received"] < 1_000
    ledger = check_ledger(own / "state" / "audit" / "client-0")
    assert ledger.findings == []
    arrays = [sum(array.bytes for intent in ledger.of(Intent, run) for array in intent.arrays) for run in ledger.runs]
    assert arrays == [239_242, 853_642]
    framing = [wire - own for wire, own in zip(on_the_wire, arrays, strict=True)]
    assert all(0 < bytes_ < FRAMING for bytes_ in framing), framing
    assert framing[1] - framing[0] < 0.05 * (arrays[1] - arrays[0]), framing
