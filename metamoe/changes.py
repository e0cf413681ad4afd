"""A unified model changed for one client: out of a finished run another one, in a folder of its own."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metamoe.common.config import Settings
from metamoe.common.data.datasets import check_domains, load_private
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.model.artifact import MANIFEST, read_weights
from metamoe.common.presets import changed, load_settings
from metamoe.common.wire import Kind
from metamoe.server.changes import CHANGES, Change, begin_changed, left_out, merged_experts, sent_in
from metamoe.server.proxies import kept_selections

_OF_A_MODEL = ("model", "accuracy.json", "training")
"""In a client's folder: what was delivered to it, with everybody's experts, and trainings that had not come to an end."""


@dataclass(frozen=True)
class Changed:
    """A run that has begun out of another.

    Attributes:
        settings: its own.
        asked: by client what it is to be asked; nothing for those from whom all is taken over.
        said: what a user should know, in sentences.
        deployed: whether the clients are separate processes of a federation.
        from_beginning: whether a run from its beginning with these settings makes the same model.
    """

    settings: Settings
    asked: dict[str, list[Kind]]
    said: list[str]
    deployed: bool
    from_beginning: bool


def run_folder(place: Path) -> Path:
    """The folder of the run that was given, or whose model was.

    Raises:
        InputFileError: there is no run.
    """
    folder = place.absolute()
    for found in (folder, folder.parent):
        if (found / "settings.toml").is_file() and (found / "server").is_dir():
            return found
    raise InputFileError(
        f"{place} is neither a run's folder nor the model in one; to change a model takes what its run keeps (settings.toml, "
        "server/), such as runs/demo"
    )


def begin(place: Path, change: Change, out: Path) -> Changed:
    """Make the folder of the changed run; :func:`metamoe.simulation.resume_simulation`, or for a federation ``metamoe deploy
    resume``, does the rest.

    Args:
        place: folder of a finished run, or of its model.
        change: what to do.
        out: folder of the new run, new or empty.

    Raises:
        InputFileError: there is no run, or something in the new folder.
        InvalidSettingError: there is no such client, or too few are left, or others would have to begin anew.
        EmptyPartitionError: a new client of a simulation has no data.
        RunFailedError: the run has not come to its end.
        StateFileError, ModelFileError: what it left is damaged.
    """
    old = run_folder(place)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputFileError(f"--out {out} is not an empty folder; give another one")
    before = load_settings(str(old / "settings.toml"))
    missing = left_out(old, before)
    settings = _settings(before, change, missing)
    state = old / "clients"
    if change.kind == "add" and state.is_dir():
        check_domains(settings.data)
        load_private(settings, settings.client_names.index(change.client), "train")
    asked = begin_changed(old, out, before, settings, change)
    if state.is_dir():
        _copy_clients(state, out / "clients", settings)
        if (old / "flower").is_dir():
            (out / "flower").mkdir()
    said, deployed = _said(old, change, asked, missing), not state.is_dir()
    if deployed and settings.clients > before.clients:
        said.append(
            f"a new place: owners whose policy has a rule for clients (policy.toml, settings) have to allow {settings.clients} "
            "there; the others need not do anything"
        )
    if kept := kept_selections(out):
        said.append(
            f"{', '.join(kept)} keep proxies that were chosen out of an earlier public set: this is the model of no run from "
            "the beginning, in which they would be chosen anew"
        )
    return Changed(settings, asked, said, deployed, from_beginning=not kept)


def _settings(before: Settings, change: Change, missing: Sequence[str]) -> Settings:
    if wrong := [text for text in change.public if not text.startswith("data.public")]:
        raise InvalidSettingError(
            f"--set {wrong[0]}: who is refreshed can get another public set (data.public, data.public-hub, "
            "data.public-samples, data.public-without); with other settings all would begin anew, so make a new run"
        )
    name, part = change.client, [name for name in before.member_names if name not in missing]
    absent = {*before.without, *missing}
    if change.kind == "add" and name not in before.client_names:
        return _with_place(changed(before, [f"without={sorted(absent)}"]), name)
    if change.kind == "add" and name in part:
        raise InvalidSettingError(f"{name} has a part in the model; 'metamoe model refresh' asks it anew")
    if change.kind != "add" and name not in part:
        raise InvalidSettingError(f"{name!r} has no part in the model; {', '.join(part)} have")
    absent = absent - {name} if change.kind == "add" else absent | {name} if change.kind == "remove" else absent
    return changed(before, [f"without={[name for name in before.client_names if name in absent]}", *change.public])


def _with_place(before: Settings, name: str) -> Settings:
    """The settings with a place more, where that changes no other client's name or data."""
    domains, count = before.data.domains, before.clients
    if count > len(domains) or name in domains[:count]:
        raise InvalidSettingError(
            f"{name!r} is no free place of this run. A place more would change what others have: {count} clients share "
            f"{len(domains)} domains by their number. Make a new run with clients = {count + 1}"
        )
    if count < len(domains) and domains[count] != name:
        raise InvalidSettingError(f"{name!r} is no free place of this run; the next is {domains[count]!r} (data.domains)")
    if before.data.hub and len(before.data.hub) <= count:
        raise InvalidSettingError(f"{name!r} has no hub id in data.hub; name it in {name}'s place, in the run's settings.toml")
    added = [] if count < len(domains) else [f"data.domains={[*domains, name]}"]
    return changed(before, [f"clients={count + 1}", *added])


def _copy_clients(state: Path, target: Path, settings: Settings) -> None:
    """What a simulation's clients keep: all ledgers, and of those that take part their experts; no model from before."""
    shutil.copytree(state / "audit", target / "audit", ignore=shutil.ignore_patterns(".lock"))
    for name in settings.member_names:
        if (state / name).is_dir():
            shutil.copytree(state / name, target / name, ignore=shutil.ignore_patterns(*_OF_A_MODEL, "*.lock"))


def _said(old: Path, change: Change, asked: dict[str, list[Kind]], missing: Sequence[str]) -> list[str]:
    said = [f"{name} was missing in {old}, and stays so ('metamoe model add' asks it)" for name in missing if name not in asked]
    for merged, clients in merged_experts(old).items():
        if change.client in clients:
            said.append(f"{merged} was merged of {', '.join(clients)}; it is made anew of the experts that these sent")
    for name, kinds in asked.items():
        if kinds and name != change.client:
            why = "it goes by the public set" if change.public and kinds == ["profile"] else "it is no longer whole here"
            said.append(f"{name} is asked again for its {' and '.join(kinds)}: {why}")
    silent = [name for name, kinds in asked.items() if not kinds]
    said.append(f"taken over, and asked nothing: {', '.join(silent) or 'nobody'}")
    if change.kind != "remove":
        said.append(f"asked alone: {change.client}")
    return said


@dataclass(frozen=True)
class ExpertOverview:
    """One expert of a model: bytes of its matrices, the clients that it was made of, and the run in which it was sent, as far
    as the model lies in its run.
    """

    name: str
    bytes: int
    clients: list[str]
    sent_in: str | None


@dataclass(frozen=True)
class Overview:
    """What a unified model consists of.

    Attributes:
        model: its hash.
        seed_model: where its seed was found.
        decides: once, in every layer, or on the embedding (``router.decide``).
        top_k: experts that compute each token.
        experts: in their order; without the seed.
        without: clients that have a place in its run and no part in it.
        changes: how it came out of other models, oldest first: the lines of changes.jsonl.
    """

    model: str
    seed_model: str
    decides: str
    top_k: int
    experts: list[ExpertOverview]
    without: list[str]
    changes: list[dict[str, Any]]


def overview(place: Path) -> Overview:
    """What a model consists of, after checking every file's hash.

    Args:
        place: its folder, or its run's.

    Raises:
        ModelFileError: there is no model, or a file of it is missing, added or changed.
        StateFileError: the journal of its run is damaged.
    """
    folder = place / "model" if (place / "model" / MANIFEST).is_file() else place
    manifest, weights = read_weights(folder)
    run = folder.absolute().parent if (folder.absolute().parent / "settings.toml").is_file() else None
    merged = merged_experts(run) if run else {}
    experts = [
        ExpertOverview(
            name,
            sum(matrix.nbytes for matrix in expert.values()),
            merged.get(name, [name]),
            sent_in(run, name) if run and name not in merged else None,
        )
        for name, expert in zip(manifest.experts, weights.experts, strict=True)
    ]
    without = load_settings(str(run / "settings.toml")).without if run else ()
    changes = (
        [json.loads(line) for line in (run / CHANGES).read_text().splitlines()] if run and (run / CHANGES).is_file() else []
    )
    return Overview(
        manifest.model_hash, manifest.seed_model, manifest.router.decide, manifest.router.top_k, experts, list(without), changes
    )
