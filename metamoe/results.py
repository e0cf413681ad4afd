"""What a run came to, as objects: the form of its results.json."""

from pydantic import BaseModel, ConfigDict, Field

from metamoe.common.metrics import Metrics
from metamoe.simulations.benchmark.tables import Sent


class _Part(BaseModel):
    # What a later version adds is left out, so that its runs can be read.
    model_config = ConfigDict(frozen=True, extra="ignore")


class ClientTransfer(_Part):
    """What one client sent and received."""

    name: str
    bytes_up: int = Field(description="bytes of the arrays that it sent")
    bytes_down: int = Field(description="bytes of the arrays that it received")
    artifacts: list[Sent] = Field(description="every array that it sent")


class MissingClient(_Part):
    """A client that the run went on without."""

    name: str
    stage: str = Field(description="in which it dropped out")
    reason: str


class RunResults(_Part):
    """Accuracies in percent, shares from 0 to 1, times in seconds."""

    preset: str
    seed: int
    model: str = Field(description="hash of the unified model")
    accuracy: dict[str, dict[str, float]] = Field(description="of each method on each domain, and its average over them, %")
    public_accuracy: dict[str, float] = Field(description="of each method on the held-out public samples, %")
    metrics: dict[str, dict[str, Metrics]] = Field({}, description="of each method on each domain and the public samples")
    worst_domain: dict[str, str] = Field({}, description="of each method the domain on which it is worst")
    client_accuracy: dict[str, dict[str, float]] = Field(
        {},
        description="of each method for each client: on its domain's tests, weighted by the client's own classes, %",
    )
    worst_client: dict[str, str] = Field({}, description="of each method the client for whom it is worst")
    data: dict[str, str] = Field({}, description="of each set the hub id with its commit, or the folder; of built-in data none")
    routing: dict[str, dict[str, float]] = Field(description="of each domain's tokens the share that went to each expert")
    clients: list[ClientTransfer]
    missing: list[MissingClient]
    timings: dict[str, float] = Field(description="of each stage at the server, seconds")
