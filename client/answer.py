"""A client's answer to the server: check the common ground, then do what the stage asks."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock

from metamoe.client.deliver import store_and_evaluate
from metamoe.client.dp_sgd import train_with_privacy
from metamoe.client.expert import expert_key, expert_routing_vectors, expert_samples, train_expert
from metamoe.client.policy import policy_of
from metamoe.client.private import private_samples
from metamoe.client.profile import profile
from metamoe.client.site import Site
from metamoe.common.audit.policy import check_private_samples
from metamoe.common.audit.release import permitted
from metamoe.common.compute import place_of, threads
from metamoe.common.config import Settings
from metamoe.common.data.datasets import known_classes, label_space, load_public, public_fingerprint
from metamoe.common.data.tasks import class_names
from metamoe.common.errors import (
    InvalidSettingError,
    PrivateDataError,
    ProtocolError,
    PublicDataMismatchError,
    SeedMismatchError,
)
from metamoe.common.events import EventLog
from metamoe.common.files import replaced_folder, write_json
from metamoe.common.model.artifact import UnifiedWeights, routers_from
from metamoe.common.model.lora import expert_shapes, load_adapter, save_adapter
from metamoe.common.model.seed import Seed, seed_at
from metamoe.common.privacy import expert_mechanism
from metamoe.common.wire import Kind, Request, reply_artifacts


def answer(kind: Kind, request: Request, site: Site) -> dict[str, np.ndarray]:
    """The arrays of the reply to one request.

    Raises:
        InvalidSettingError: this client has no place in a run of so few.
        SeedMismatchError, PublicDataMismatchError: server and client do not hold the same; nothing has been computed.
        PrivateDataError, EmptyPartitionError: this client has no data, or none for this run.
    """
    settings = request.settings
    if site.client >= settings.clients:
        raise InvalidSettingError(f"this is client {site.client}, but the run has clients = {settings.clients}")
    place = place_of(settings.compute, "client")
    seed = seed_at(settings.seed_model, place)
    _check_common_ground(request, seed)
    folder = site.state / settings.client_names[site.client]
    with threads(settings.compute.client_threads), place.computing():
        match kind:
            case "profile" if request.only_introduces(site.client):
                return {"client": np.array(site.client)}
            case "profile":
                return _profile(seed, settings, site)
            case "expert":
                return _expert(seed, settings, site, request.arrays["proxies"], folder)
            case "deliver":
                return _deliver(seed, request, site, folder)


def _check_common_ground(request: Request, seed: Seed) -> None:
    if request.seed != seed.fingerprint:
        raise SeedMismatchError(f"the server's seed model is {request.seed[:12]}, this client's is {seed.fingerprint[:12]}")
    if request.public != (own := public_fingerprint(request.settings.data)):
        raise PublicDataMismatchError(f"the server's public set is {request.public[:12]}, this client's is {own[:12]}")


def _profile(seed: Seed, settings: Settings, site: Site) -> dict[str, np.ndarray]:
    private, public = _training_samples(settings, site), load_public(settings.data)
    names = [artifact.name for artifact in permitted(policy_of(site), reply_artifacts("profile", settings, seed))]
    noise = site.noise(settings.seed, 1)
    said = profile(seed, settings, site.client, private, public, noise, shape="seed-shape" in names)
    arrays = {"client": np.array(site.client)} | said
    return {name: arrays[name] for name in names}


def _expert(seed: Seed, settings: Settings, site: Site, ids: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    events = EventLog(folder / "events.jsonl")
    name = folder.name
    public = load_public(settings.data)
    if ids.min() < 0 or ids.max() >= len(public):
        raise ProtocolError(f"proxies has rows {ids.min()} to {ids.max()}, but the public set has {len(public)}")
    private = _training_samples(settings, site)
    samples = expert_samples(settings, private, public.select(ids))
    space = label_space(class_names(private), class_names(public))
    progress = partial(events, "expert", client=name)
    validation = private_samples(settings, site, "validation") if settings.expert_training.evaluate_every else None
    stored = folder / "experts" / expert_key(seed, settings, site.client, samples, space, validation)
    stored.parent.mkdir(parents=True, exist_ok=True)
    # An expert that was trained before, in another run or by another process just now, is not trained again.
    with FileLock(f"{stored}.lock"):
        if stored.is_dir():
            expert = load_adapter(stored)
            progress(settings.expert_training.epochs, settings.expert_training.epochs)
        else:
            kept = folder / "training" / stored.name
            if settings.privacy.expert == "dp-sgd":
                start = train_expert(seed, settings, site.client, samples[1:], space, progress, kept=kept / "proxies")
                rng, mechanism = site.noise(settings.seed, 2), expert_mechanism(settings)
                expert = train_with_privacy(
                    seed, settings, private, space, start, mechanism, rng, progress, kept / "private", validation
                )
            else:
                expert = train_expert(seed, settings, site.client, samples, space, progress, kept=kept, validation=validation)
            with replaced_folder(stored) as new:
                save_adapter(new, seed, settings.lora, expert)
                write_json(new / "proxies.json", ids.tolist())
            shutil.rmtree(kept, ignore_errors=True)
    arrays = {name: tensor.numpy() for name, tensor in expert.items()}
    if "routing-vectors" in {artifact.name for artifact in reply_artifacts("expert", settings, seed)}:
        arrays["routing-vectors"] = expert_routing_vectors(seed, settings, expert, samples)
    return arrays


def _training_samples(settings: Settings, site: Site) -> Dataset:
    private = private_samples(settings, site, "train")
    check_private_samples(policy_of(site), len(private))
    privacy = settings.privacy
    if (privacy.vectors != "none" or privacy.expert != "none") and len(private) < privacy.min_samples:
        raise PrivateDataError(
            f"{len(private)} private training samples are less than privacy.min-samples = {privacy.min_samples}"
        )
    return private


def _deliver(seed: Seed, request: Request, site: Site, folder: Path) -> dict[str, np.ndarray]:
    settings, arrays = request.settings, request.arrays
    names = list(request.experts)
    experts = [
        {matrix: torch.from_numpy(arrays[f"expert.{k}.{matrix}"]) for matrix in expert_shapes(seed, settings.lora)}
        for k in range(len(names))
    ]
    routers = routers_from({n.removeprefix("router."): a for n, a in arrays.items() if n.startswith("router.")})
    test = private_samples(settings, site, settings.data.evaluate_on)
    classes = known_classes(settings.data)
    percent = store_and_evaluate(seed, settings, names, classes, UnifiedWeights(experts, routers), test, folder)
    return {"accuracy": np.array(percent, dtype=np.float32)} if settings.report_accuracy else {}
