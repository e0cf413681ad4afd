"""Killed everywhere, and the same model: SIGKILL to each process of a run in each of its stages, then resumed.

Each case is a real run of three clients. The few that continuous integration runs are marked slow, all others faults:
``make faults`` runs them all.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from metamoe.common.config import Settings
from metamoe.common.events import read_events
from metamoe.common.model.artifact import load_model
from metamoe.common.presets import changed, to_toml
from metamoe.deploy import flower
from metamoe.deploy.keys import Federation, make_keys
from metamoe.deploy.processes import down, up
from metamoe.simulations.local import run_local
from tests.conftest import small_run
from tests.unit.simulations.test_resume import check, epochs_once

METAMOE = str(Path(sys.executable).parent / "metamoe")
STAGES = ("profile", "embed", "select", "expert", "unify", "deliver", "evaluate")
ASKED = ("profile", "expert", "deliver")
# Only that a test ends: a machine with other work takes long.
SECONDS = 1_200
CI = {
    ("local", "command", "unify"),
    ("ray", "command", "expert"),
    ("deployed", "superlink", "expert"),
}


def cases() -> Iterator[object]:
    """Every backend, what of it is killed, and when."""
    table = [("local", "command", stage) for stage in STAGES]
    table += [("ray", target, stage) for target in ("command", "superlink", "server") for stage in STAGES[:-1]]
    table += [("ray", "command", "evaluate"), *(("ray", "worker", stage) for stage in ASKED)]
    table += [("deployed", target, stage) for target in ("command", "superlink", "server", "node", "app") for stage in ASKED]
    for case in table:
        yield pytest.param(*case, marks=pytest.mark.slow if case in CI else pytest.mark.faults, id="-".join(case))


@pytest.fixture(scope="module")
def settings(seed_folder: Path) -> Settings:
    """A run of some seconds, whose trainings can be caught at work."""
    return changed(small_run(seed_folder), ["expert-training.epochs=30", "router-training.epochs=30", "compute.timeout=240"])


@pytest.fixture(scope="module")
def expected(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of an undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed")
    run_local(settings, out)
    return load_model(out / "model").manifest.model_hash


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keys of three clients and a server, which a test starts; stopped in the end."""
    folder = tmp_path_factory.mktemp("deployed") / "federation"
    make_keys(folder, Federation(host="localhost", port=flower.free_port(), clients=3), 30, datetime.now(UTC))
    try:
        yield folder
    finally:
        down(folder)


def processes(home: Path, *words: str) -> list[int]:
    """Processes with Flower's files in this folder whose command line has one of these words."""
    lines = {}
    for pid in flower.left_running(home):
        try:
            lines[pid] = " ".join(psutil.Process(pid).cmdline())
        except psutil.NoSuchProcess:
            continue
    return [pid for pid, line in lines.items() if any(word in line for word in words)]


def wait_until(condition: Callable[[], object], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition() and run.poll() is None:
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


def reached(out: Path, stage: str) -> bool:
    """Whether a stage has begun; of what clients do, whether one is at it."""
    if stage == "expert":
        return any((out / "clients").glob("*/events.jsonl")) or any(
            event.stage == "expert" for event, _ in read_events(out / "events.jsonl")
        )
    if stage == "evaluate":
        return (out / "server" / "summary.json").is_file()
    if stage == "profile":
        return (out / "server" / "journal.jsonl").is_file()
    return any(event.stage == stage for event, _ in read_events(out / "events.jsonl"))


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([METAMOE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def to_its_end(out: Path, *command: str) -> None:
    """Resume until the run has come to its end, which one time must do."""
    done = subprocess.run([METAMOE, *command], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "server" / "summary.json").is_file()


@pytest.mark.parametrize(("backend", "target", "stage"), cases())
def test_killed_and_resumed(
    backend: str, target: str, stage: str, settings: Settings, expected: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    preset, out = tmp_path / "preset.toml", tmp_path / "run"
    preset.write_text(to_toml(settings))
    if backend == "deployed":
        deployed(request.getfixturevalue("federation"), target, stage, preset, out)
        check(out, settings, expected, request.getfixturevalue("federation") / "clients")
        return
    run = start("simulate", "--preset", str(preset), "--out", str(out), "--backend", backend)
    home = out / "flower"
    words = {"superlink": ["flower-superlink"], "server": ["flwr-simulation"], "worker": ["ray::ClientAppActor"]}
    wait_until(lambda: reached(out, stage), run)
    kill([run.pid] if target == "command" else processes(home, *words[target]))
    run.communicate(timeout=SECONDS)
    assert (run.returncode == 0) == (out / "results.json").is_file()
    to_its_end(out, "resume", str(out))
    assert processes(home, "") == []
    check(out, settings, expected, None)
    epochs_once(out, settings)


def deployed(federation: Path, target: str, stage: str, preset: Path, out: Path) -> None:
    """A run over processes of their own, one of which is killed; what Flower does not bring back, the commands do."""
    up(federation, lambda _: None)
    run = start("deploy", "run", str(federation), "--preset", str(preset), "--out", str(out))
    server, client = federation / "server" / "flower", federation / "clients" / "client-1" / "flower"
    victims = {
        "superlink": (server, "flower-superlink"),
        "server": (server, "flwr-serverapp"),
        "node": (client, "flower-supernode"),
        "app": (client, "flwr-clientapp"),
    }
    wait_until(lambda: reached(out, stage), run)
    if target == "command":
        kill([run.pid])
    else:
        wait_until(lambda: processes(*victims[target]), run)
        kill(processes(*victims[target]))
    up(federation, lambda _: None)
    run.communicate(timeout=SECONDS)
    to_its_end(out, "deploy", "resume", str(federation), str(out))


@pytest.mark.parametrize(
    ("backend", "kills", "longest"),
    [pytest.param("local", 4, 9.0, marks=pytest.mark.slow), pytest.param("ray", 20, 30.0, marks=pytest.mark.faults)],
)
def test_random_kills(backend: str, kills: int, longest: float, settings: Settings, tmp_path: Path) -> None:
    """Six clients; again and again, after a random time, a random process of the run is killed, and in the end the command."""
    six, rng = changed(settings, ["clients=6", "seed=3"]), random.Random(0)
    preset, out = tmp_path / "preset.toml", tmp_path / "run"
    preset.write_text(to_toml(six))
    command = ["simulate", "--preset", str(preset), "--out", str(out), "--backend", backend]
    for _ in range(kills):
        run = start(*command)
        deadline = time.monotonic() + rng.uniform(longest / 3, longest)
        while time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.05)
        kill([rng.choice([run.pid, *sorted(processes(out / "flower", ""))])])
        try:
            run.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            kill([run.pid])
            run.communicate(timeout=SECONDS)
        if (out / "settings.toml").is_file():
            command = ["resume", str(out)]
    to_its_end(out, *command)
    run_local(six, tmp_path / "undisturbed")
    check(out, six, load_model(tmp_path / "undisturbed" / "model").manifest.model_hash)
