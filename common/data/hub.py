"""Data sets from a hub."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from datasets import DatasetBuilder, DatasetDict, load_dataset, load_dataset_builder

from metamoe.common.config import Settings
from metamoe.common.errors import HubError
from metamoe.common.hub import HUB_FAILURES, hub_error

# Where the hub keeps its own conversion of a data set that is published as a script.
_CONVERTED = "refs/convert/parquet"
_COMMIT = re.compile(r"[0-9a-f]{40}")

_Loaded = TypeVar("_Loaded", DatasetBuilder, DatasetDict)


def hub_name(hub: str) -> str:
    """The id alone, without configuration and revision."""
    return hub.partition("@")[0].partition(":")[0]


def pinned(settings: Settings) -> Settings:
    """The same settings with the commit of every data set that a hub gives, so that all who read them read the same, now and
    later: ``allenai/ai2_arc:ARC-Easy@210d026...``. Offline it is the commit that the cache holds.

    Raises:
        HubError: the hub does not give one.
    """
    data = settings.data
    if data.folder or data.source == "glyphs":
        return settings
    # Of domains that clients have, only they know.
    domains = tuple(map(_pinned, data.hub)) if data.private == "built-in" else data.hub
    at_commits = {"public_hub": _pinned(data.public_hub), "hub": domains}
    return settings.model_copy(update={"data": data.model_copy(update=at_commits)})


def _pinned(hub: str) -> str:
    commit = builder_of(hub).hash
    return f"{hub.partition('@')[0]}@{commit}" if commit and _COMMIT.fullmatch(commit) else hub


def builder_of(hub: str) -> DatasetBuilder:
    """What a data set consists of, before any of it is downloaded; arguments and errors as :func:`load_from_hub`."""
    return _asked(load_dataset_builder, hub)


def load_from_hub(hub: str) -> DatasetDict:
    """All parts of a data set.

    Args:
        hub: its id, after a colon its configuration, and after an @ a revision: "allenai/ai2_arc:ARC-Easy@main"; or a folder
            that mirrors it.

    Raises:
        HubError: the hub does not give it, or the cache, which is used without a connection, holds another commit.
    """
    found = _asked(load_dataset, hub)
    wanted, loaded = hub.partition("@")[2], _commit_of(found)
    if loaded and _COMMIT.fullmatch(wanted) and loaded != wanted:
        raise HubError(
            f"data.hub = {hub!r}: the hub cannot be reached, and the cache holds commit {loaded}; run once with a connection, "
            "or name that commit"
        )
    return found


def _commit_of(found: DatasetDict) -> str | None:
    """The commit of which a data set was made: its folder in the cache is named after it."""
    files = [entry["filename"] for part in found.values() for entry in part.cache_files]
    folder = Path(files[0]).parent.name if files else ""
    return folder if _COMMIT.fullmatch(folder) else None


def _asked(load: Callable[..., _Loaded], hub: str) -> _Loaded:
    rest, _, revision = hub.partition("@")
    name, configuration = hub_name(hub), rest.partition(":")[2]
    try:
        try:
            return load(name, configuration or None, revision=revision or None)
        except RuntimeError as error:
            # Scripts are not run any more, for good reasons.
            if revision or "script" not in str(error):
                raise
            return load(name, configuration or None, revision=_CONVERTED)
    except HUB_FAILURES as error:
        raise hub_error("data.hub", hub, error) from error
