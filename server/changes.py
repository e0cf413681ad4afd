"""A run that begins with what clients sent in an earlier one: a model changed for one client, while the others compute nothing.

::

    server/journal.jsonl     a line for each reply that is taken over, with the run in which it was sent (``from``)
    server/replies, experts  those replies, and no others
    server/kept-proxies.json the proxies of clients that keep theirs, where one client has some of another public set
    server/audit             the earlier run's ledger, which goes on; of those who left it has hashes
    changes.jsonl            a line for each change, with the messages that had held what is no longer here

The stages do what the journal does not name, see :mod:`metamoe.server.stages`, and so make what a run with these settings makes
from its beginning: each is a function of the same replies. An expert is taken over only as the answer to its proxies: where
others are chosen now, its client is asked again. With another public set for one client, the others keep the proxies that they
have, which must be in it too; the model is then that of no run from the beginning.
"""

import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metamoe.common.audit.entries import Arrival, digest_of, settings_hash
from metamoe.common.audit.ledger import LEDGER
from metamoe.common.audit.verify import check_ledger
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_public, public_fingerprint, rows_of_same
from metamoe.common.errors import InvalidSettingError, RunFailedError, StateFileError
from metamoe.common.files import replaced_folder, write_atomically
from metamoe.common.model.artifact import read_manifest
from metamoe.common.presets import to_toml
from metamoe.common.wire import Kind, Request, encode_request, question_hash
from metamoe.server.journal import JOURNAL, journal_line, read_journal
from metamoe.server.proxies import KEPT, Selection, kept_selections, read_selections, write_selections
from metamoe.server.state import is_as_noted, last_reply, reply_place, reply_taken_over, stored_reply

CHANGES = "changes.jsonl"
_LEARNED: tuple[Kind, ...] = ("profile", "expert")


@dataclass(frozen=True)
class Change:
    """What is done to one client's part in a model; ``public``, of one that is refreshed, has settings (NAME=VALUE) of another
    public set, out of which its proxies are chosen.
    """

    kind: Literal["remove", "add", "refresh"]
    client: str
    public: tuple[str, ...] = ()


def left_out(out: Path, settings: Settings) -> list[str]:
    """Names of the clients that a finished run's settings have and its model does not.

    Raises:
        RunFailedError: the run has not come to its end.
        StateFileError: its journal is damaged.
    """
    if not (out / "server" / "summary.json").is_file():
        raise RunFailedError(f"{out} holds no run that has come to its end; go on with it first: metamoe resume {out}")
    lines = read_journal(out)
    return [name for name in settings.member_names if not all(last_reply(lines, kind, name) for kind in _LEARNED)]


def merged_experts(out: Path) -> dict[str, list[str]]:
    """By their names the merged experts of a finished run's model, each with the clients whose experts it was made of.

    Raises:
        StateFileError: its journal is damaged.
    """
    notes = [line for line in read_journal(out) if line["what"] == "unify"]
    return dict(notes[-1]["merged"]) if notes else {}


def sent_in(out: Path, name: str) -> str | None:
    """The run in which a client sent the expert that a run folder holds; None where there is none.

    Raises:
        StateFileError: the journal is damaged.
    """
    lines = read_journal(out)
    line = last_reply(lines, "expert", name)
    return str(line.get("from", lines[0]["run"])) if line else None


def begin_changed(old: Path, new: Path, before: Settings, settings: Settings, change: Change) -> dict[str, list[Kind]]:
    """Make the folder of a run that goes on from another, for the stages to do the rest.

    Args:
        old: folder of a finished run; it stays as it is.
        new: where; replaced when all is there.
        before, settings: the old run's, and the new one's.
        change: by which they differ.

    Returns:
        By client what it is to be asked; nothing for those from whom all is taken over.

    Raises:
        StateFileError: the old run's journal is damaged, its settings are not those that it began with, or its public set or
            proxies, where these are needed, are not there any more.
        InvalidSettingError: another public set is none, or has not all proxies that the others were trained on, or they would
            spend differential privacy anew.
        ModelFileError: its model is damaged.
    """
    lines = read_journal(old)
    first, run = lines[0], secrets.token_hex(16)
    if first["settings"] != settings_hash(before):
        raise StateFileError(f"{old / 'settings.toml'} is not what the run in {old} began with; put it back")
    public = public_fingerprint(settings.data) if change.public else first["public"]
    if change.public and public == first["public"]:
        raise InvalidSettingError(f"{', '.join(change.public)}: the public set stays what it was; leave it out")
    kept = _kept(old, lines, before, settings, change)
    asked = _questions(old, lines, settings, kept)
    # Of these the others are asked anew where another public set is their measure.
    anew_by_all = ["profile"] if public != first["public"] and _measures_by_public(settings) else []
    journal = [{**first, "run": run, "settings": settings_hash(settings), "public": public}]
    open_questions: dict[str, list[Kind]] = {name: [] for name in settings.member_names}
    with replaced_folder(new) as folder:
        for name, questions in open_questions.items():
            for kind in _LEARNED:
                line = last_reply(lines, kind, name)
                anew = name == change.client or kind in anew_by_all or (kind == "expert" and name not in asked)
                if anew or line is None or stored_reply(old, line) is None:
                    questions.append(kind)
                    continue
                source, target = reply_place(old, kind, name), reply_place(folder, kind, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
                journal.append(reply_taken_over(line, first["run"], asked.get(name) if kind == "expert" else None))
        write_atomically(folder / "server" / JOURNAL, b"".join(map(journal_line, journal)))
        shutil.copytree(old / "server" / "audit", folder / "server" / "audit", ignore=shutil.ignore_patterns(".lock"))
        said = (old / CHANGES).read_text() if (old / CHANGES).is_file() else ""
        record = _record(old, lines, before, change, run) | ({"public": public} if change.public else {})
        write_atomically(folder / CHANGES, said + json.dumps(record) + "\n")
        if kept:
            write_selections(folder / KEPT, public, kept)
        write_atomically(folder / "settings.toml", to_toml(settings))
    return open_questions


def _questions(old: Path, lines: Sequence[dict[str, Any]], settings: Settings, kept: Mapping[str, Selection]) -> dict[str, str]:
    """By client the hash of what it was asked for its expert; of none, if the proxies are no longer what was chosen."""
    if not is_as_noted(lines, "select", old / "proxies.json"):
        return {}
    seed, public = lines[0]["seed"], lines[0]["public"]
    return {
        name: question_hash([], encode_request(Request(settings, seed, public, {"proxies": selection.ids})))
        for name, selection in {**read_selections(old / "proxies.json"), **kept}.items()
    }


def _measures_by_public(settings: Settings) -> bool:
    """Whether what a client says of its samples is relative to the public set: a shape is in coordinates in which that is
    white, and a classifier tells the samples from it.
    """
    return settings.by_shape or (settings.proxies.selection != "random" and settings.proxies.relevance == "classifier")


def _kept(
    old: Path, lines: Sequence[dict[str, Any]], before: Settings, settings: Settings, change: Change
) -> dict[str, Selection]:
    """By client the proxies that it keeps, in the rows of the new run's public set."""
    others = [name for name in settings.member_names if name != change.client]
    if not change.public:
        return {name: selection for name, selection in kept_selections(old).items() if name in others}
    if settings.privacy.vectors != "none":
        raise InvalidSettingError(
            f"another public set with privacy.vectors = {settings.privacy.vectors}: its noise goes by the public set, so that "
            "every client would spend differential privacy anew; make a new run"
        )
    if public_fingerprint(before.data) != lines[0]["public"] or not is_as_noted(lines, "select", old / "proxies.json"):
        raise StateFileError(
            f"the public set of the run in {old}, or its proxies.json, is not what it was, so nobody can say which samples the "
            "others were trained on; put it back, and give another public set a place of its own"
        )
    selections = {name: own for name, own in read_selections(old / "proxies.json").items() if name in others}
    ids = sorted({int(row) for own in selections.values() for row in own.ids})
    rows = dict(zip(ids, rows_of_same(load_public(before.data).select(ids), load_public(settings.data)), strict=True))
    for name, own in selections.items():
        if missing := sum(rows[int(row)] is None for row in own.ids):
            raise InvalidSettingError(
                f"{', '.join(change.public)}: {missing} of {name}'s {len(own.ids)} proxies, on which its expert was trained, "
                "are not in this public set; add to the old one, or make a new run"
            )
    return {name: replace(own, ids=np.array([rows[int(row)] for row in own.ids])) for name, own in selections.items()}


def _record(old: Path, lines: Sequence[dict[str, Any]], before: Settings, change: Change, run: str) -> dict[str, Any]:
    """What was changed, out of which run, and the messages by which what goes had been released."""
    gone = []
    if change.kind != "add" and (old / "server" / "audit" / LEDGER).is_file():
        number = before.client_names.index(change.client)
        ledger = check_ledger(old / "server" / "audit")
        for kind in _LEARNED:
            line = last_reply(lines, kind, change.client) or {}
            gone += [
                {"run": arrival.run, "stage": kind, "message": arrival.message, "arrays": digest_of(arrival.arrays)}
                for arrival in ledger.of(Arrival, line.get("from", lines[0]["run"]))
                if (arrival.client, arrival.stage) == (number, kind)
            ]
    return {
        "change": change.kind,
        "client": change.client,
        "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%MZ}",
        "run": run,
        "from": {"run": lines[0]["run"], "model": read_manifest(old / "model").model_hash},
        "gone": gone,
    }
