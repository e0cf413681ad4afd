"""What a hub gives, refuses and no longer gives, by one on this machine: a mirror is an address, HF_ENDPOINT."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Image
from PIL import Image as PILImage

from tests.conftest import tiny_options
from tests.unit.common.hub_stand_in import GATED, hub_of
from tests.unit.common.test_hub import SETS, stand_in

COMMITS = {"house/pics": "a" * 40, "house/alpaca": "b" * 40, GATED: "c" * 40}
# In a process of its own: where the hub is, libraries read when they are imported.
SCRIPT = """
import json, os, pathlib
from metamoe.common.data.datasets import fingerprint, load_public, public_fingerprint
from metamoe.common.data.hub import load_from_hub, pinned
from metamoe.common.errors import MetaMoEError
from metamoe.common.presets import validated

def tried(what):
    try:
        return what()
    except MetaMoEError as error:
        return str(error)

def kept():
    return sorted(f.suffix for f in pathlib.Path(os.environ["HF_HOME"]).rglob("*") if f.suffix in (".arrow", ".parquet"))

data = {"source": "images", "public-hub": "house/pics", "hub": ["house/pics"], "domains": ["x"]}
def settings(**more):
    return tried(lambda: pinned(validated({"clients": 1, "data": data | more})).data)

streamed = settings(streaming=True)
found = {"pinned": [streamed.public_hub, *streamed.hub]}
found["streamed"] = tried(lambda: [public_fingerprint(streamed), len(load_public(streamed, "test")), kept()])
downloaded = settings()
found["downloaded"] = tried(lambda: [fingerprint(load_public(downloaded)), len(load_public(downloaded, "test")), kept()])
found["text"] = tried(lambda: len(load_from_hub("house/alpaca")["train"]))
for name in ("house/pics@" + "e" * 40, "house/gated", "house/none"):
    found[name] = tried(lambda: load_from_hub(name) and "there")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    features = {"image": Image(), "label": ClassLabel(names=["dog", "cat"])}
    drawn = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3), dtype=np.uint8)
    rows = [{"image": PILImage.fromarray(pixels), "label": number % 2} for number, pixels in enumerate(drawn)]
    stand_in(folder / "pics", features, {"train": rows[:40], "test": rows[40:]})
    stand_in(folder / "alpaca", SETS["tatsu-lab/alpaca"][0], {"train": [SETS["tatsu-lab/alpaca"][1]] * 20})
    return folder


@pytest.fixture(scope="module")
def environment(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    home = tmp_path_factory.mktemp("home")
    with hub_of({"house/pics": sets / "pics", "house/alpaca": sets / "alpaca", GATED: sets}, COMMITS) as address:
        yield os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "METAMOE_CACHE": str(home / "own")}


def said(environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_a_hub_gives_and_refuses(environment: dict[str, str]) -> None:
    found = said(environment)
    assert found["pinned"] == [f"house/pics@{'a' * 40}"] * 2
    # The same samples, pixel for pixel, and none of them on disk.
    hashed, tests, kept = found["streamed"]
    assert (tests, kept) == (8, [])
    assert found["downloaded"][:2] == [hashed, tests]
    assert ".arrow" in found["downloaded"][2]
    assert found["text"] == 20
    assert "the hub has no such name" in found["house/pics@" + "e" * 40]
    assert "the hub has no such name, or not for you" in found["house/none"]
    assert "it is gated: accept its licence on the hub, and log in" in found["house/gated"]

    # Without a connection, the cache.
    found = said(environment | {"HF_HUB_OFFLINE": "1"})
    assert found["pinned"] == [f"house/pics@{'a' * 40}"] * 2
    assert found["downloaded"][0] == hashed
    assert found["text"] == 20
    assert f"the cache holds commit {'a' * 40}; run once with a connection" in found["house/pics@" + "e" * 40]
    assert "HF_HUB_OFFLINE is set, and the cache does not have it" in found["house/none"]


@pytest.mark.slow
def test_a_run_records_the_commits_and_its_public_set_can_stay_at_the_hub(
    environment: dict[str, str], seed_folder: Path, tmp_path: Path
) -> None:
    sets = {"data.public-hub": "house/pics", "data.hub": '["house/pics@main"]', "data.domains": '["pets"]'}
    options = tiny_options(**{"seed-model": seed_folder, "clients": 1, "data.streaming": "true", **sets})
    command = [Path(sys.executable).parent / "metamoe", "simulate", "--backend", "local", "--out", tmp_path / "run", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    at = f"house/pics@{'a' * 40}"
    assert json.loads((tmp_path / "run" / "results.json").read_text())["data"] == {"public": at, "pets": at}
    assert f'public-hub = "{at}"' in (tmp_path / "run" / "settings.toml").read_text()
    assert f"| data, public | `{at}` |" in (tmp_path / "run" / "model" / "README.md").read_text()
