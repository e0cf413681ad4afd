"""Where a client's private samples come from: the built-in domains, or its own folder."""

import hashlib

from datasets import Dataset

from metamoe.client.folder import read_folder, read_question_folder
from metamoe.client.site import Site
from metamoe.common.config import Settings
from metamoe.common.data.datasets import known_classes, load_private
from metamoe.common.data.questions import with_distractors
from metamoe.common.data.tasks import class_names
from metamoe.common.errors import PrivateDataError


def private_samples(settings: Settings, site: Site, split: str) -> Dataset:
    """One split of a client's private data.

    Raises:
        PrivateDataError: settings and site do not agree on whose data it is; the folder cannot be used; or it has a class whose
            name was not agreed on.
        EmptyPartitionError: this client has no data.
    """
    if settings.data.private == "built-in":
        if site.data is not None:
            raise PrivateDataError(f"the run is for built-in data, but this client has its own in {site.data}")
        return _to_choose(load_private(settings, site.client, split), settings, split)
    if site.data is None:
        raise PrivateDataError(
            "the run is for the clients' own data, but this client has no data-dir in its node config, or it is empty"
        )
    if settings.data.is_text:
        return _to_choose(read_question_folder(site.data, split, settings.data), settings, split)
    data = read_folder(site.data, split, settings.data)
    # A name that not all know is not told by training on it either.
    if unknown := sorted(set(class_names(data)) - set(known_classes(settings.data))):
        raise PrivateDataError(f"class {unknown[0]!r} of {site.data} is neither in data.classes nor public; agree on it first")
    return data


def _to_choose(data: Dataset, settings: Settings, split: str) -> Dataset:
    """What is evaluated has to have something to choose among: with a single answer, any model would be right."""
    return with_distractors(data) if settings.data.is_text and split != "train" else data


def private_hash(site: Site) -> str:
    """SHA-256 over the client's own files, by path and content: whether its data is what it was. It never leaves. Of built-in
    data, which the settings decide, it is the same always.
    """
    digest = hashlib.sha256()
    if site.data is not None:
        # All of them: parts have many names, and may be cut out of one file.
        for file in sorted(file for file in site.data.rglob("*") if file.is_file()):
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.relative_to(site.data).as_posix()} {content}\n".encode())
    return digest.hexdigest()
