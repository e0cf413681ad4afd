"""Erasure of a record (GDPR, article 17): what it took part in, what must be done, and the proof that it was done."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from metamoe.audit.ledgers import Found
from metamoe.client.private import private_samples
from metamoe.client.records import leaf, leaves_of, record_hashes, records_key
from metamoe.client.site import Site
from metamoe.common.audit.entries import Erasure, Intent, Open, Records, Stage
from metamoe.common.audit.keys import read_public
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import kind_of_array
from metamoe.common.audit.terms import settings_file
from metamoe.common.audit.verify import Checked, check_ledger
from metamoe.common.config import Settings
from metamoe.common.errors import MetaMoEError, StateFileError
from metamoe.common.presets import validated

_MINUTE = 60


@dataclass(frozen=True)
class Part:
    """What a record took part in: one reply of one run.

    Attributes:
        record: its hash.
        run: the run.
        stage: of the reply.
        root: of the list of records that the reply was computed of.
        sent: kinds of artifacts that left with it.
        members: names of the clients of the run, who get its model.
        erased: whether the ledger says that the record was erased since.
    """

    record: str
    run: str
    stage: Stage
    root: str
    sent: Sequence[str]
    members: list[str]
    erased: bool


@dataclass(frozen=True)
class Answer:
    """What a client's ledger says of some records, and what is left to be done.

    Attributes:
        parts: all that they took part in.
        unknown: those of them that took part in nothing that is committed to.
        unclear: runs of which this cannot be told, and why.
        left: what the client still keeps of the records, in words.
    """

    parts: list[Part]
    unknown: list[str]
    unclear: dict[str, str]
    left: list[str]


def look_up(found: Found, records: Sequence[str]) -> Answer:
    """What records took part in, from a client's ledger and the lists beside it.

    Args:
        found: the client's ledger.
        records: their hashes, see :func:`metamoe.client.records.record_hashes`.

    Raises:
        InputFileError: the ledger cannot be read.
        StateFileError: it commits to records, but the key of their hashes is not beside it.
    """
    checked = check_ledger(found.folder, read_public(found.key), name=found.name)
    opened = {entry.run: entry for entry in checked.of(Open)}
    erased = {(entry.run, entry.leaf) for entry in checked.of(Erasure)}
    commitments = checked.of(Records)
    committed, parts = {entry.run for entry in commitments}, []
    old = "its ledger commits to no records: it is of an earlier version"
    unclear = {intent.run: old for intent in checked.of(Intent) if intent.run not in committed}
    key = records_key(found.folder) if commitments else b""
    for entry in commitments:
        try:
            leaves = set(leaves_of(found.folder, entry.root))
        except StateFileError as error:
            unclear[entry.run] = str(error)
            continue
        sent = [intent for intent in checked.of(Intent, entry.run) if intent.stage == entry.stage]
        kinds = dict.fromkeys(kind_of_array(array.name) for intent in sent for array in intent.arrays)
        named = [kind for kind in kinds if kind not in ("client", "ledger")]
        settings = _settings(found.folder, opened[entry.run])
        for record in records:
            if (own := leaf(key, entry.run, record)) in leaves:
                members, gone = settings.client_names if settings else [], (entry.run, own) in erased
                parts.append(Part(record, entry.run, entry.stage, entry.root, named, members, gone))
    unknown = [record for record in records if record not in {part.record for part in parts}]
    return Answer(parts, unknown, unclear, list(_left(found, records, parts, checked)))


def write_down(found: Found, answer: Answer) -> int:
    """Add to the client's ledger that the records were erased, and seal each of their runs anew; the number of lines.

    Raises:
        StateFileError: something of the records is still there.
        LedgerError: it cannot be written down.
    """
    if answer.left:
        raise StateFileError(f"not erased yet: {answer.left[0]} ({len(answer.left)} in all); nothing is written down")
    if not answer.parts:
        return 0
    ledger, key, lines = Ledger(found.folder), records_key(found.folder), 0
    for run in dict.fromkeys(part.run for part in answer.parts):
        new = {(p.root, leaf(key, run, p.record)) for p in answer.parts if p.run == run and not p.erased}
        if new:
            ledger.append(*(Erasure(run=run, root=root, leaf=own) for root, own in sorted(new)))
            ledger.seal(run)
            lines += len(new)
    return lines


def steps(parts: Sequence[Part]) -> Iterator[str]:
    """What must be done, in sentences for whoever answers for the data."""
    if not parts:
        return
    runs = ", ".join(dict.fromkeys(part.run[:8] for part in parts))
    names = ", ".join(dict.fromkeys(name for part in parts for name in part.members)) or "not known: settings are not here"
    yield "take the record out of the client's data"
    yield "remove what the client keeps that was computed while it was there: what there is stands below"
    if any("expert" in part.sent for part in parts):
        yield "run again: a new expert, trained without it, takes the place of the old one; or run without this client"
    yield f"tell the server to delete what it has of the runs {runs}: means, experts, and the models made of them"
    yield f"tell those who got a model of these runs to replace it ({names}): what has left cannot be called back"


def _left(found: Found, records: Sequence[str], parts: Sequence[Part], checked: Checked) -> Iterator[str]:
    """What is still there: the record itself, and whatever was computed while it was."""
    if not parts:
        return
    state, number = found.folder.parents[1], int(found.folder.name.rpartition("-")[2])
    data = state.parent / "data"
    site = Site(number, state, data if data.is_dir() and any(data.iterdir()) else None)
    runs = {part.run for part in parts}
    known = (_settings(found.folder, opened) for opened in checked.of(Open) if opened.run in runs)
    settings = next((one for one in known if one), None)
    if settings is None:
        yield "the settings of the runs are not beside the ledger, so that nothing can be looked up"
        return
    for split in ("train", "validation", "test"):
        try:
            held = set(record_hashes(private_samples(settings, site, split)))
        except MetaMoEError:
            # A client need not have this part.
            continue
        yield from (f"record {record[:16]} is in the data ({split})" for record in records if record in held)
    own = state / settings.client_names[number]
    places = [*own.glob("experts/*/"), *own.glob("training/*/"), own / "model"]
    places += [*(state / "outbox" / f"client-{number}").glob("*/"), *(state / "released" / f"client-{number}").glob("*/")]
    last = max(datetime.fromisoformat(line.time).timestamp() for line, _ in checked.lines if line.entry.run in runs)
    yield from (
        f"{place} was made while the record was there"
        for place in places
        if place.is_dir() and place.stat().st_mtime < last + _MINUTE
    )


def _settings(folder: Path, opened: Open) -> Settings | None:
    file = settings_file(folder, opened.settings)
    return validated(json.loads(file.read_bytes())) if file.is_file() else None
