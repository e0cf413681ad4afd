"""The public set and the clients' private sets as ``datasets.Dataset``: loading, caching, partition, content hash."""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, disable_progress_bars, enable_progress_bars, load_from_disk

from metamoe.common.config import Data, Settings
from metamoe.common.data import glyphs
from metamoe.common.data.images import load_images
from metamoe.common.data.partition import divided
from metamoe.common.data.questions import load_questions, with_distractors
from metamoe.common.data.stream import Streamed, file_of
from metamoe.common.errors import EmptyPartitionError, InvalidSettingError
from metamoe.common.files import cache_folder, made_once


@lru_cache(maxsize=2)
def load_public(data: Data, split: str = "train") -> Dataset:
    """The public set D0 (``"train"``) or its held-out part (``"test"``).

    Raises:
        InvalidSettingError: ``data.public-without`` leaves nothing.
    """
    whole = _public(data, split)
    if split == "train" and data.public_without:
        names = np.array(whole.features["label"].names)
        kept = np.array([not set(re.split(r"\W+", name)) & set(data.public_without) for name in names])
        whole = whole.select(np.flatnonzero(kept[np.asarray(whole["label"])]))
        if len(whole) == 0:
            raise InvalidSettingError(f"data.public-without = {list(data.public_without)} leaves no public sample")
    size = data.public_samples if split == "train" or data.source == "glyphs" else data.test_samples
    return _random_part(whole, size, np.random.default_rng(0))


def _public(data: Data, split: str) -> Dataset:
    if data.source == "glyphs":
        return _cached(data.source, f"public-{split}", lambda: glyphs.public(split))
    if data.source == "images":
        return load_images(data, data.public, split, data.public_hub)
    questions = load_questions(data, data.public, split, data.public_hub)
    return with_distractors(questions) if split == "test" else questions


def load_private(settings: Settings, client: int, split: str) -> Dataset:
    """The private samples of one client; validation and test parts are its whole domain's.

    With more clients than domains the training part is divided among the clients of a domain, see
    :func:`metamoe.common.data.partition.divided`.

    Raises:
        EmptyPartitionError: nothing is left for this client.
    """
    domain = settings.client_domain(client)
    data = load_domain(settings.data, domain, split)
    if split == "train":
        rows = private_rows(settings, client, data)
        data = data if len(rows) == len(data) else data.select(rows)
    if len(data) == 0:
        owners = len(_owners(settings, client))
        kind = settings.data.partition.kind
        way, remedy = f"data.partition.kind = {kind}", "another kind"
        if kind == "dirichlet":
            way, remedy = f"data.dirichlet = {settings.data.dirichlet}", "a larger value"
        raise EmptyPartitionError(
            f"client {settings.client_names[client]!r} has no training samples: {owners} clients share {domain!r} at "
            f"{way}; use fewer clients or {remedy}"
        )
    return data


def private_rows(settings: Settings, client: int, domain: Dataset) -> np.ndarray:
    """Which rows of its domain's training part are a client's, in their order. int64 [N]."""
    name, owners, rows = settings.client_domain(client), _owners(settings, client), np.arange(len(domain))
    if len(owners) > 1 or settings.data.partition.kind not in ("dirichlet", "iid"):
        rng = np.random.default_rng([settings.seed, settings.data.domains.index(name)])
        rows = divided(domain, name, settings.data, len(owners), rng)[owners.index(client)]
    return rows[_random_rows(len(rows), settings.data.private_samples, np.random.default_rng([settings.seed, client]))]


def _owners(settings: Settings, client: int) -> list[int]:
    return [k for k in range(settings.clients) if settings.client_domain(k) == settings.client_domain(client)]


def load_domain(data: Data, domain: str, split: str) -> Dataset:
    """One private domain as a whole: ``split`` is "train", "validation" or "test"; of the latter two as many samples as
    ``data.test-samples`` says.
    """
    if data.source == "glyphs":
        whole = _cached(data.source, f"{domain}-{split}", lambda: glyphs.private(domain, split))
    else:
        load = load_images if data.source == "images" else load_questions
        whole = load(data, domain, split, data.hub[data.domains.index(domain)] if data.hub else "")
    return whole if split == "train" else _random_part(whole, data.test_samples, np.random.default_rng(0))


def held_out_public(data: Data) -> Dataset:
    """The public samples that show what was forgotten: held out, or for validation as many training ones."""
    held_out = load_public(data, "test")
    if data.evaluate_on == "test":
        return held_out
    training = _random_part(load_public(data, "train"), len(held_out), np.random.default_rng(1))
    return with_distractors(training) if data.is_text else training


def evaluation_sets(data: Data) -> dict[str, Dataset]:
    """What a model is evaluated on, by name: each domain's test part, or with ``data.test-corruptions`` each of them changed in
    each way ("digits, blur"); with ``data.evaluate-on``, the validation part in its place.
    """
    part = data.evaluate_on
    tests = {domain: load_domain(data, domain, part) for domain in data.domains}
    if data.is_text:
        # With a single answer to choose, any model would be right.
        return {domain: with_distractors(test) for domain, test in tests.items()}
    if not data.test_corruptions:
        return tests
    return {
        f"{domain}, {corruption}": _cached(
            data.source, f"{domain}-{part}-{corruption}", partial(glyphs.corrupted, test, corruption)
        )
        for corruption in data.test_corruptions
        for domain, test in tests.items()
    }


def check_domains(data: Data) -> None:
    """Raise if the settings name a domain that the data source does not have.

    Raises:
        InvalidSettingError: names it and lists those there are.
    """
    if data.private == "own" or data.source != "glyphs":
        return
    if unknown := sorted(set(data.domains) - set(glyphs.DOMAINS)):
        raise InvalidSettingError(f"data.domains has {unknown[0]!r}; {data.source!r} has {', '.join(glyphs.DOMAINS)}")


def known_classes(data: Data) -> list[str]:
    """Every class name of the public set and of the domains, as their source publishes them or the settings name them: what a
    unified model chooses among. Questions bring their own choices, so of them there are none.
    """
    if data.is_text:
        return []
    public = load_public(data).features["label"].names
    if data.private == "own":
        return label_space(public, data.classes)
    if data.source == "glyphs":
        return label_space(public, *map(glyphs.class_names, data.domains))
    return label_space(public, *(load_domain(data, domain, "train").features["label"].names for domain in data.domains))


def label_space(*parts: Sequence[str]) -> list[str]:
    """One list of class names for several data sets: the union, in order of first appearance."""
    return list(dict.fromkeys(name for names in parts for name in names))


def fingerprint(dataset: Dataset) -> str:
    """Content hash of a data set: SHA-256 over the class names and every image's size, pixels and label, or over every
    question, in order.
    """
    if "label" not in dataset.features:
        rows = (json.dumps([row["prompt"], row["choices"], row["answer"]]) for row in dataset)
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()
    digest = hashlib.sha256(repr(dataset.features["label"].names).encode())
    for start in range(0, len(dataset), 1_000):
        chunk = dataset[start : start + 1_000]
        for image, label in zip(chunk["image"], chunk["label"], strict=True):
            digest.update(f"{image.mode} {image.size} {label}\n".encode())
            digest.update(image.tobytes())
    return digest.hexdigest()


def rows_of_same(samples: Dataset, whole: Dataset) -> list[int | None]:
    """For each sample the row of a data set that holds the same, by pixels and class name or by question, each row once; None
    where there is none.
    """
    rows: dict[str, list[int]] = {}
    for row, digest in enumerate(_sample_hashes(whole)):
        rows.setdefault(digest, []).append(row)
    left = {digest: iter(found) for digest, found in rows.items()}
    return [next(left.get(digest, iter(())), None) for digest in _sample_hashes(samples)]


def _sample_hashes(dataset: Dataset) -> Iterator[str]:
    if "label" not in dataset.features:
        for row in dataset:
            yield hashlib.sha256(json.dumps([row["prompt"], row["choices"], row["answer"]]).encode()).hexdigest()
        return
    names = dataset.features["label"].names
    for start in range(0, len(dataset), 1_000):
        chunk = dataset[start : start + 1_000]
        for image, label in zip(chunk["image"], chunk["label"], strict=True):
            about = f"{image.mode} {image.size} {names[label]}\n".encode()
            yield hashlib.sha256(about + image.tobytes()).hexdigest()


@lru_cache(maxsize=2)
def public_fingerprint(data: Data) -> str:
    """Content hash of the public set that these settings name.

    It is kept in the cache by these settings and by size and time of every file behind the set, so that not every process
    decodes all of it.
    """
    public = load_public(data)
    files = _files_of(public)
    if not files:
        return fingerprint(public)
    # All settings, as many decide what a sample is; it is no loss that some do not.
    own = {"workers", "hub", "domains", "dirichlet", "partition", "private_samples", "test_samples"}
    made_of = data.model_dump_json(exclude=own)
    return made_once("fingerprints", [made_of], files, lambda: fingerprint(public))


def _files_of(dataset: Dataset) -> list[str]:
    """The files that hold a data set: tables, or the images that a table in memory names."""
    if dataset.cache_files or "image" not in dataset.features:
        return [entry["filename"] for entry in dataset.cache_files]
    paths = [image["path"] for image in dataset.cast_column("image", Image(decode=False))["image"]]
    return sorted(set(map(file_of, paths))) if isinstance(dataset.features["image"], Streamed) else paths


def _random_part(data: Dataset, size: int, rng: np.random.Generator) -> Dataset:
    """``size`` random rows in their old order; everything if that is 0 or not less."""
    return data.select(_random_rows(len(data), size, rng)) if 0 < size < len(data) else data


def _random_rows(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(count)[:size]) if 0 < size < count else np.arange(count)


def _cached(source: str, name: str, make: Callable[[], Dataset]) -> Dataset:
    """Make a built-in data set once for this version of code and libraries; afterwards it is memory-mapped."""
    code = hashlib.sha256(Path(glyphs.__file__).read_bytes()).hexdigest()[:12]
    versions = "-".join(version(package) for package in ("pillow", "matplotlib", "scikit-learn", "numpy"))
    folder = cache_folder() / source / f"{code}-{versions}" / name
    if not folder.is_dir():
        temporary = folder.with_name(f".{name}-{uuid.uuid4().hex}")
        try:
            with no_progress_bars():
                make().save_to_disk(temporary)
            temporary.rename(folder)
        except OSError:
            # Another process was faster: its folder is as good as ours.
            shutil.rmtree(temporary, ignore_errors=True)
            if not folder.is_dir():
                raise
    return load_from_disk(folder)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the datasets library from drawing bars of its own beside ours."""
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
