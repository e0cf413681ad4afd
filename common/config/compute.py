"""Settings of where and how a run computes."""

from typing import Annotated, Literal

from pydantic import Field

from metamoe.common.config.section import Count, NonNegative, Positive, Section

DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
Device = Annotated[str, Field(pattern=DEVICE, description="auto: a GPU where there is one, or else the CPU")]
Precision = Literal["float32", "bfloat16"]
Weights = Literal["auto", "float32", "bfloat16"]


class Compute(Section):
    """What the run may use. Thread counts are fixed because sums in another order give other last digits."""

    client_threads: Count = Field(1, description="of torch and BLAS, for each client")
    server_threads: Count = Field(2, description="of torch and BLAS, at the server")
    client_device: Device = "auto"
    server_device: Device = "auto"
    precision: Precision = Field(
        "float32", description="bfloat16: matrix products in it (autocast), for GPUs; LoRA, router and sums stay float32"
    )
    weights: Weights = Field(
        "auto",
        description="how the frozen seed is held in memory: auto is as it is stored on a GPU with precision = bfloat16, and "
        "float32 otherwise",
    )
    micro_batch_size: int = Field(
        0, ge=0, description="samples of a training batch that are computed at a time, gradients added up; 0 is the whole batch"
    )
    batch_tokens: int = Field(
        0,
        ge=0,
        description="tokens of a batch at most, padding counted, where nothing is trained; 0 is 65536 on a GPU, and on a CPU "
        "256 images or 4 texts",
    )
    parallel_clients: Count = Field(2, description="clients that a simulation computes at the same time")
    gpus_per_client: Literal["auto"] | NonNegative = Field(
        "auto",
        description="share of a GPU that Ray gives each client of a simulation; auto is the GPUs by the parallel clients",
    )
    connect_timeout: Positive = Field(120.0, description="seconds to wait until all clients are connected")
    timeout: Positive = Field(3_600.0, description="seconds a stage may take before the missing clients are reported")
    rejoin_timeout: NonNegative = Field(
        600.0,
        description="seconds to wait for a client that dropped out to come back, before it is missing; one whose process ended "
        "is asked again, three times at most; 0 is neither",
    )
