"""Real Flower runs on Ray: the same result as in one process, nothing left behind, failures told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from metamoe.common.config import Settings
from metamoe.common.errors import ProxyCountError
from metamoe.common.model.artifact import load_model
from metamoe.common.presets import to_toml
from metamoe.simulations.flower import run_flower
from metamoe.simulations.local import run_local
from metamoe.simulations.prepare import Placement

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def preset(small: Settings, tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(to_toml(small))
    return file


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that were started for a run in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("FLWR_HOME", "")
        except psutil.Error:
            continue
        if home.startswith(str(folder)):
            found.append(" ".join(process.cmdline()))
    return found


def start(*arguments: str, **options) -> subprocess.Popen[str]:
    command = [str(BIN / "metamoe"), "simulate", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_ray_and_local_agree_to_the_bit_and_nothing_is_left(small: Settings, preset: Path, tmp_path: Path) -> None:
    out = tmp_path / "ray"
    # From a folder where other packages have our names: they must not be picked up.
    for name in ("client", "common", "server"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    run = start("--preset", str(preset), "--out", str(out), cwd=tmp_path / "elsewhere")
    shown, _ = run.communicate(timeout=300)
    assert run.returncode == 0, shown
    run_local(small, tmp_path / "local")
    assert (out / "proxies.json").read_bytes() == (tmp_path / "local" / "proxies.json").read_bytes()
    hashes = {load_model(tmp_path / name / "model").manifest.model_hash for name in ("ray", "local")}
    assert len(hashes) == 1
    results = json.loads((out / "results.json").read_text())
    assert [client["name"] for client in results["clients"]] == ["digits", "greek", "arrows"]
    assert left_behind(tmp_path) == []


def test_a_client_with_a_share_of_a_gpu_is_shown_it(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that Ray is told of, and that nobody computes on: torch finds no driver for it."""
    (tmp_path / "seeing.py").write_text(
        "import os, pathlib\n"
        "from flwr.clientapp import ClientApp\n"
        "from metamoe.client import app as ours\n"
        "class Seeing(ClientApp):\n"
        "    def __call__(self, message, context):\n"
        "        seen = os.environ.get('CUDA_VISIBLE_DEVICES', 'all')\n"
        "        pathlib.Path(os.environ['METAMOE_SEEN'], str(os.getpid())).write_text(seen)\n"
        "        return ours.app(message, context)\n"
        "app = Seeing()\n"
    )
    out = tmp_path / "run"
    (out / "seen").mkdir(parents=True)
    (out / "settings.toml").write_text(to_toml(small))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("METAMOE_SEEN", str(out / "seen"))
    run_flower(small, out, client_app="seeing:app", placement=Placement(1, 0.5))
    # Two actors with half of it each.
    assert [file.read_text() for file in (out / "seen").iterdir()] == ["0", "0"]
    assert (out / "server" / "summary.json").is_file()


def test_ctrl_c_cleans_up(preset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start("--preset", str(preset), "--out", str(out), "--set", "expert-training.epochs=100000", start_new_session=True)
    deadline = time.monotonic() + 240
    events = out / "clients" / "digits" / "events.jsonl"
    while not events.is_file():
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.5)
    assert left_behind(tmp_path)
    os.killpg(run.pid, signal.SIGINT)
    shown, _ = run.communicate(timeout=120)
    assert run.returncode == 130, shown
    assert "Traceback" not in shown
    assert left_behind(tmp_path) == []
    assert not (out / "model").exists()


def test_a_failure_of_the_server_ends_the_run_with_its_reason_and_code(preset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["--set", "data.public-samples=250", "--set", "proxies.pool=250"]
    run = start("--preset", str(preset), "--out", str(out), *changes)
    shown, _ = run.communicate(timeout=300)
    assert run.returncode == ProxyCountError.exit_code, shown
    assert "proxies.pool = 250 is not less than the 250 samples" in shown
    assert left_behind(tmp_path) == []


def test_flwr_run_works_as_a_flower_user_expects(preset: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39391",
        "FLWR_LOCAL_CONTROL_API_PORT": "39393",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [str(BIN / "flwr"), "run", ".", "--stream", "--run-config", f'preset="{preset}" out="{out}" set="seed=5"']
    command += ["--federation-config", "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert (out / "server" / "summary.json").is_file(), done.stdout + done.stderr
        assert load_model(out / "model").manifest.experts == ["digits", "greek", "arrows"]
        assert "seed = 5" in (out / "settings.toml").read_text()
    finally:
        # Flower leaves its local SuperLink running for the next run; this one is the test's.
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == str(home):
                    process.kill()
            except psutil.Error:
                continue
