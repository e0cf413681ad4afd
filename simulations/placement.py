"""Where the two sides of a simulation compute, and what share of the machine's GPUs each client gets."""

import math

import torch

from metamoe.common.compute import Place, place_of
from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError
from metamoe.simulations.prepare import Placement

_DIGITS = 10_000
"""Ray counts in parts of a GPU of this size."""


def placement_of(settings: Settings, on_ray: bool) -> Placement:
    """Where the settings have a simulation compute, on this machine.

    Args:
        settings: of the run.
        on_ray: whether clients are Ray's actors, each of which sees the GPU that it has a share of and no other; else all is in
            this process.

    Raises:
        InvalidSettingError: a device is not here, does not compute in the precision, or cannot be a client's on Ray.
    """
    compute, cards = settings.compute, torch.cuda.device_count()
    server, client = place_of(compute, "server"), place_of(compute, "client")
    parallel = min(compute.parallel_clients, settings.clients) if on_ray else 1
    share = _share(settings, client, cards) if on_ray else 0.0
    if on_ray and client.device.type == "cuda" and not share:
        client = Place(torch.device("cpu"), client.precision, client.weights)
    if share:
        together = min(parallel, math.floor(cards / share)) if share <= cards else 0
        taken = set(range(math.ceil(together * share - 1 / _DIGITS)))
        each = f", {together} at a time with {share:g} of a GPU each"
    else:
        taken = {client.device.index} if client.device.type == "cuda" else set()
        each = f", {parallel} at a time"
    taken |= {server.device.index} if server.device.type == "cuda" else set()
    lines = [f"the server computes on {_named(server)}", f"clients compute on {_named(client, shared=bool(share))}{each}"]
    return Placement(cards, share, lines, _unused(cards, taken))


def _share(settings: Settings, client: Place, cards: int) -> float:
    compute = settings.compute
    if compute.client_device not in ("auto", "cpu", "cuda", "cuda:0"):
        raise InvalidSettingError(
            f"compute.client-device = {compute.client_device}: on Ray a client sees only the GPU that it has a share of, as "
            "cuda:0; set auto or cuda"
        )
    wanted = compute.gpus_per_client
    if wanted == "auto":
        exact = min(1.0, cards / min(compute.parallel_clients, settings.clients)) if client.device.type == "cuda" else 0.0
        return math.floor(exact * _DIGITS) / _DIGITS
    if wanted > cards:
        raise InvalidSettingError(f"compute.gpus-per-client = {wanted:g}: torch sees {cards} GPUs here; set auto, or less")
    if wanted > 1 and wanted % 1:
        raise InvalidSettingError(f"compute.gpus-per-client = {wanted:g}: above 1, Ray gives whole GPUs only; set {wanted:.0f}")
    if not wanted and compute.client_device.startswith("cuda"):
        raise InvalidSettingError(
            f"compute.gpus-per-client = 0 with compute.client-device = {compute.client_device}: Ray hides every GPU from a "
            "client without a share; set gpus-per-client = auto"
        )
    return wanted


def _named(place: Place, shared: bool = False) -> str:
    device = place.device
    kind = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{'cuda' if shared else device}{kind} in {place.precision}"


def _unused(cards: int, taken: set[int]) -> list[str]:
    left = [f"cuda:{card}" for card in range(cards) if card not in taken]
    if not left:
        return []
    names = f"{', '.join(left)} {'is' if len(left) == 1 else 'are'} not used"
    return [f"{names}; see compute.client-device, server-device, parallel-clients and gpus-per-client"]
