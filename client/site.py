"""Where a client runs: its number in the federation, and its own folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Site:
    """What a client knows about itself."""

    client: int
    state: Path
    data: Path | None = None

    @property
    def log(self) -> Path:
        """What went wrong here; it never leaves."""
        return self.state / f"client-{self.client}.log"


def site_of(node_config: Mapping[str, object], run_config: Mapping[str, object]) -> Site:
    """The site as node config says it (``partition-id``, ``state-dir``, and ``data-dir`` for data of its own); in a simulation
    the folder lies in the run's.
    """
    state = node_config.get("state-dir") or Path(str(run_config["out"])) / "clients"
    data = node_config.get("data-dir")
    return Site(int(str(node_config["partition-id"])), Path(str(state)), Path(str(data)) if data else None)
