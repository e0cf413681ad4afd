"""The command ``metamoe audit erase``."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from metamoe.audit.ledgers import Found, ledgers_at
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.options import console, json_option, put_json
from metamoe.show import show_table

_HASH_LENGTH = 64
_FIELDS = (
    "client, parts (record, run, stage, root, sent, members, erased), unknown, unclear, left, steps, written (lines of proof)"
)


def erase(
    place: Annotated[Path, typer.Argument(help="Folder of a run, a federation or a client.")],
    record: Annotated[
        list[str],
        typer.Option(help="A picture's file, or a record's hash (of a picture: sha256sum). Can be repeated."),
    ],
    client: Annotated[str | None, typer.Option(help="Which client's, such as client-0, where there are several.")] = None,
    done: Annotated[
        bool, typer.Option("--done", help="Write into the client's ledger that it was erased, if nothing of it is left here.")
    ] = False,
    as_json: Annotated[bool, json_option(_FIELDS)] = False,
) -> None:
    """Answer what a record took part in, and what must be done so that it is erased (GDPR, article 17). The exit code is 5
    where there are runs of which this cannot be told.
    """
    from metamoe.audit.erasure import look_up, steps, write_down

    hashes = [_hash_of(one) for one in record]
    with ledgers_at(place) as ledgers:
        found = _one(ledgers.clients, client, place)
        answer = look_up(found, hashes)
        written = write_down(found, answer) if done else 0
    todo = list(steps(answer.parts))
    if as_json:
        put_json({"client": found.name, **asdict(answer), "steps": todo, "written": written})
        raise typer.Exit(5 if answer.unclear else 0)
    rows = [
        [
            part.record[:16],
            part.run[:8],
            part.stage,
            ", ".join(part.sent),
            ", ".join(part.members),
            "yes" if part.erased else "",
        ]
        for part in answer.parts
    ]
    if rows:
        title = f"what it took part in, at {found.name}"
        show_table(console, ["record", "run", "stage", "what left", "who got the model", "erased"], rows, title=title)
    for what in answer.unknown:
        console.print(f"{what[:16]}: took part in nothing that {found.name} commits to", highlight=False, soft_wrap=True)
    for run, why in answer.unclear.items():
        console.print(f"[red]cannot be told[/red] of run {run[:8]}: {escape(why)}", highlight=False, soft_wrap=True)
    for number, step in enumerate(todo, 1):
        console.print(f"{number}. {step}", markup=False, highlight=False, soft_wrap=True)
    for what in answer.left:
        console.print(f"still here: {what}", style="red", markup=False, highlight=False, soft_wrap=True)
    if done:
        console.print(f"written down: {written} lines in {found.folder}", highlight=False, soft_wrap=True)
    raise typer.Exit(5 if answer.unclear else 0)


def _one(clients: list[Found], name: str | None, place: Path) -> Found:
    chosen = [one for one in clients if name in (None, one.name)]
    if len(chosen) != 1:
        names = ", ".join(one.name for one in clients) or "none"
        raise InvalidSettingError(f"{place} holds the ledgers of these clients: {names}; give one of them with --client")
    return chosen[0]


def _hash_of(record: str) -> str:
    """A hash as it is given, or that of a file."""
    if len(record) == _HASH_LENGTH and set(record) <= set("0123456789abcdef"):
        return record
    try:
        return hashlib.sha256(Path(record).read_bytes()).hexdigest()
    except OSError as error:
        raise InputFileError(f"--record {record} is neither a SHA-256 of 64 hexadecimal digits nor a file") from error
