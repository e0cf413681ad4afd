"""Where a client runs: its number in the federation, and its own folders."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metamoe.common.compute import derived_seed

_NOISE = 7


@dataclass(frozen=True)
class Site:
    """What a client knows about itself.

    Attributes:
        client: its number in the federation.
        state: its own folder; in a simulation that of all clients.
        data: the folder of its own data; None where data is built in.
        policy: the file in which its owner says what may leave; None for the policy that comes with the product.
        simulation: whether this is one of many clients of one researcher, with nobody's data to protect.
        behind_gateway: whether its owner's gateway stands between it and the server, and waits for the policy's time step.
    """

    client: int
    state: Path
    data: Path | None = None
    policy: Path | None = None
    simulation: bool = True
    behind_gateway: bool = False

    @property
    def log(self) -> Path:
        """What went wrong here; it never leaves."""
        return self.state / f"client-{self.client}.log"

    def noise(self, seed: int, stage: int) -> np.random.Generator:
        """Where the noise of differential privacy comes from: in a simulation the run's seed, so that it can be repeated; else
        the operating system. The run's seed comes from the server, who could take such noise away again.
        """
        return np.random.default_rng(
            derived_seed(seed, _NOISE, stage, self.client) if self.simulation else secrets.randbits(256)
        )

    @property
    def audit(self) -> Path:
        """The ledger of what left, and the key that signs it."""
        return self.state / "audit" / f"client-{self.client}"


def site_of(node_config: Mapping[str, object], run_config: Mapping[str, object]) -> Site:
    """The site as node config says it (``partition-id``, ``state-dir``, ``data-dir`` for data of its own if there is any,
    ``policy`` for the owner's policy, ``behind-gateway``); in a simulation, which has no ``state-dir``, the folder lies in the
    run's.
    """
    given = {key: Path(str(node_config[key])) for key in ("state-dir", "data-dir", "policy") if node_config.get(key)}
    # A container has the folder mounted whether there is data in it or not.
    if "data-dir" in given and given["data-dir"].is_dir() and not any(given["data-dir"].iterdir()):
        del given["data-dir"]
    simulation = "state-dir" not in given
    state = given.get("state-dir") or Path(str(run_config["out"])) / "clients"
    behind = bool(node_config.get("behind-gateway"))
    return Site(int(str(node_config["partition-id"])), state, given.get("data-dir"), given.get("policy"), simulation, behind)
