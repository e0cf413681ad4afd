"""What a run needs and what of it is missing, found before hours are lost."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import HfApi

from metamoe.common.compute import device_of
from metamoe.common.config import Data, Settings
from metamoe.common.data.datasets import check_domains, load_domain, load_public
from metamoe.common.data.hub import hub_name
from metamoe.common.data.pictures import find_pictures
from metamoe.common.data.questions import text_files, text_survey
from metamoe.common.data.survey import survey
from metamoe.common.errors import MetaMoEError
from metamoe.common.files import cache_folder
from metamoe.common.hub import HUB_FAILURES, hub_error
from metamoe.common.model.sizes import Sizes, predicted_sizes
from metamoe.server.proxies import check_pool
from metamoe.show import some

_LARGE = 2 * 10**9
"""Parameters above which a CPU is no fit place."""


@dataclass(frozen=True)
class Finding:
    """One thing that a run needs: what it is, what was found, and whether that will do."""

    what: str
    found: str
    fine: bool


def check_preset(settings: Settings) -> Iterator[Finding]:
    """Look for everything that a simulation with these settings needs; nothing large is downloaded or loaded."""
    try:
        sizes = predicted_sizes(settings)
    except MetaMoEError as error:
        yield Finding("seed model", str(error), False)
    else:
        yield Finding("seed model", f"{settings.seed_model}: {sizes.parameters:,} parameters", True)
        yield from _room(settings, sizes)
    if settings.data.folder or settings.data.source == "glyphs":
        yield from _local_data(settings)
    else:
        yield from _hub_data(settings)


def _room(settings: Settings, sizes: Sizes) -> Iterator[Finding]:
    compute = settings.compute
    for side in ("client", "server"):
        try:
            device = device_of(getattr(compute, f"{side}_device"))
        except MetaMoEError as error:
            yield Finding(f"{side}'s device", str(error), False)
            continue
        slow = device.type == "cpu" and sizes.parameters > _LARGE
        remedy = " - no GPU is here, and this seed on a CPU takes days" if slow else ""
        yield Finding(f"{side}'s device", f"{device}{remedy}", not slow)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            yield _bytes(f"{side}'s GPU memory", sizes.training if side == "client" else sizes.weights, free)
    # What is on a GPU is not here too.
    each = sizes.training if compute.client_device == "cpu" or not torch.cuda.is_available() else sizes.weights
    here = sizes.weights + min(settings.clients, compute.parallel_clients) * each
    yield _bytes("memory", here, psutil.virtual_memory().available)
    kept = cache_folder()
    kept.mkdir(parents=True, exist_ok=True)
    yield _bytes("disk for cache and run", 2 * sizes.weights + settings.clients * sizes.up, shutil.disk_usage(kept).free)
    yield Finding("what a client sends and receives", f"{sizes.up:,} and {sizes.down:,} bytes", True)


def _bytes(what: str, wanted: int, free: int) -> Finding:
    return Finding(what, f"{wanted / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB free", wanted <= free)


def _local_data(settings: Settings) -> Iterator[Finding]:
    data = settings.data
    try:
        check_domains(data)
        samples = len(load_public(data))
        yield Finding("public set", f"{samples:,} samples", True)
        if settings.proxies.selection != "random":
            check_pool(settings.proxies, samples)
    except MetaMoEError as error:
        yield Finding("public set", str(error), False)
    for domain in data.domains if data.private == "built-in" else ():
        try:
            train, test = (len(load_domain(data, domain, split)) for split in ("train", data.evaluate_on))
            yield Finding(domain, f"{train:,} samples to train on, {test:,} to evaluate on", True)
        except MetaMoEError as error:
            yield Finding(domain, str(error), False)
    if data.source == "images":
        yield from _pictures(data)
    elif data.is_text:
        yield from _texts(data)


def _pictures(data: Data) -> Iterator[Finding]:
    """What is unusual about the pictures of each set, and which of them cannot be read; every one is opened."""
    for name in (data.public, *(data.domains if data.private == "built-in" else ())):
        try:
            looked = survey(find_pictures(Path(data.folder) / name, data), data)
        except MetaMoEError:
            # Said above, of the set.
            continue
        yield from (Finding(name, wrong, False) for wrong in looked.wrong)
        yield from (Finding(name, f"{len(files)} {what}: {some(files)}", True) for what, files in looked.unusual.items())


def _texts(data: Data) -> Iterator[Finding]:
    """Which rows of each set are left out."""
    for name in (data.public, *(data.domains if data.private == "built-in" else ())):
        try:
            looked, _ = text_survey(text_files(Path(data.folder) / name, data), data)
        except MetaMoEError:
            # Said above, of the set.
            continue
        yield from (Finding(name, f"{len(rows)} {what}: {some(rows)}", True) for what, rows in looked.unusual.items())


def _hub_data(settings: Settings) -> Iterator[Finding]:
    data = settings.data
    for name, hub in [("public set", data.public_hub), *zip(data.domains, data.hub, strict=False)]:
        try:
            HfApi().auth_check(hub_name(hub), repo_type="dataset")
        except HUB_FAILURES as error:
            yield Finding(name, str(hub_error("data.hub", hub, error)), False)
        else:
            yield Finding(name, f"{hub} is there, and will be downloaded", True)
