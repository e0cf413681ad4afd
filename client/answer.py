"""A client's answer to the server: check the common ground, then do what the stage asks."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from client.deliver import store_and_evaluate
from client.expert import expert_routing_vectors, train_expert
from client.profile import seed_routing_vector
from client.site import Site
from common.compute import threads
from common.config import Settings
from common.data.datasets import known_classes, load_private, load_public, public_fingerprint
from common.errors import InvalidSettingError, ProtocolError, PublicDataMismatchError, SeedMismatchError
from common.events import EventLog
from common.files import replaced_folder, write_json
from common.model.artifact import UnifiedWeights, routers_from
from common.model.lora import expert_shapes, save_adapter
from common.model.seed import Seed, load_seed
from common.wire import Kind, Request


def answer(kind: Kind, request: Request, site: Site) -> dict[str, np.ndarray]:
    """The arrays of the reply to one request.

    Raises:
        InvalidSettingError: this client has no place in a run of so few.
        SeedMismatchError, PublicDataMismatchError: server and client do not hold the same; nothing has been computed.
        EmptyPartitionError: this client has no data.
    """
    settings = request.settings
    if site.client >= settings.clients:
        raise InvalidSettingError(f"this is client {site.client}, but the run has clients = {settings.clients}")
    seed = load_seed(settings.seed_model)
    _check_common_ground(request, seed)
    folder = site.state / settings.client_names[site.client]
    with threads(settings.compute.client_threads):
        match kind:
            case "profile":
                return _profile(seed, settings, site)
            case "expert":
                return _expert(seed, settings, site, request.arrays["proxies"], folder)
            case "deliver":
                return _deliver(seed, settings, site, request.arrays, folder)


def _check_common_ground(request: Request, seed: Seed) -> None:
    if request.seed != seed.fingerprint:
        raise SeedMismatchError(f"the server's seed model is {request.seed[:12]}, this client's is {seed.fingerprint[:12]}")
    if request.public != (own := public_fingerprint(request.settings.data)):
        raise PublicDataMismatchError(f"the server's public set is {request.public[:12]}, this client's is {own[:12]}")


def _profile(seed: Seed, settings: Settings, site: Site) -> dict[str, np.ndarray]:
    private = load_private(settings, site.client, "train")
    return {"client": np.array(site.client), "seed-routing-vector": seed_routing_vector(seed, private)}


def _expert(seed: Seed, settings: Settings, site: Site, ids: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    events = EventLog(folder / "events.jsonl")
    name = folder.name
    public = load_public(settings.data)
    if ids.min() < 0 or ids.max() >= len(public):
        raise ProtocolError(f"proxies has rows {ids.min()} to {ids.max()}, but the public set has {len(public)}")
    private, proxies = load_private(settings, site.client, "train"), public.select(ids)
    progress = partial(events, "expert", client=name)
    expert = train_expert(seed, settings, site.client, private, proxies, progress)
    with replaced_folder(folder / "expert") as new:
        save_adapter(new, seed, settings.lora, expert)
        write_json(new / "proxies.json", ids.tolist())
    arrays = {name: tensor.numpy() for name, tensor in expert.items()}
    if settings.router.vectors == "private":
        arrays["routing-vectors"] = expert_routing_vectors(seed, settings, expert, private, proxies)
    return arrays


def _deliver(
    seed: Seed, settings: Settings, site: Site, arrays: Mapping[str, np.ndarray], folder: Path
) -> dict[str, np.ndarray]:
    names = settings.client_names
    experts = [
        {matrix: torch.from_numpy(arrays[f"expert.{k}.{matrix}"]) for matrix in expert_shapes(seed, settings.lora)}
        for k in range(settings.clients)
    ]
    routers = routers_from({n.removeprefix("router."): a for n, a in arrays.items() if n.startswith("router.")})
    test = load_private(settings, site.client, "test")
    classes = known_classes(settings.data)
    percent = store_and_evaluate(seed, settings, names, classes, UnifiedWeights(experts, routers), test, folder)
    return {"accuracy": np.array(percent, dtype=np.float32)} if settings.report_accuracy else {}
