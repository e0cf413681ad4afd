"""The command ``metamoe audit watch``."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from metamoe.audit.ledgers import ledgers_at
from metamoe.audit.report import MEANING, write_pages
from metamoe.audit.verification import checked_at, checked_gateways
from metamoe.common.audit.entries import Arrival, Erasure, Failure, Intent, Line, Refusal, Resent
from metamoe.common.audit.policy import kind_of_array
from metamoe.common.audit.verify import Checked
from metamoe.common.errors import InputFileError
from metamoe.options import console, notes


def watch(
    place: Annotated[Path, typer.Argument(help="Folder of a run, a federation or a client; it need not have a ledger yet.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pages. (default: audit/ in the folder)")] = None,
    seconds: Annotated[int, typer.Option(min=1, help="How often to look.")] = 5,
) -> None:
    """Show what leaves while a run goes on: each message as it is written down, and the pages of 'metamoe audit report',
    written anew each time, which a browser reads again by itself. Ends with a run that has come to its end, or if interrupted.
    """
    folder = out or place / "audit"
    shown: dict[str, int] = {}
    console.print(f"pages: {folder / 'index.html'}", highlight=False, soft_wrap=True)
    with notes.status("waiting for a ledger") as status:
        while True:
            status.update(_look(place, folder, shown, seconds))
            if (place / "server" / "summary.json").is_file():
                break
            time.sleep(seconds)


def _look(place: Path, folder: Path, shown: dict[str, int], seconds: int) -> str:
    """Print what is new, and write the pages; what all checks come to."""
    ended = (place / "server" / "summary.json").is_file()
    try:
        with ledgers_at(place) as found:
            clients, servers = checked_at(found)
            ledgers = [*clients, *checked_gateways(found, servers), *servers]
            verdict = write_pages(found, folder, 0 if ended else seconds) if clients else None
    except InputFileError:
        # Not yet: a ledger begins with its first run.
        return "waiting for a ledger"
    for ledger in ledgers:
        for line, _ in ledger.lines[shown.get(ledger.name, 0) :]:
            for sentence in _told(ledger, line):
                console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        shown[ledger.name] = len(ledger.lines)
    return "waiting for a client's ledger" if verdict is None else f"the ledgers: {MEANING[verdict]}"


def _told(ledger: Checked, line: Line) -> Iterator[str]:
    begin = f"{line.time[11:16]} {ledger.name}"
    match line.entry:
        case Intent(stage=stage, arrays=arrays):
            kinds = ", ".join(dict.fromkeys(kind_of_array(array.name) for array in arrays))
            yield f"{begin}, {stage}: sends {kinds}: {sum(array.bytes for array in arrays):,} bytes"
        case Resent(stage=stage):
            yield f"{begin}, {stage}: sends the same again"
        case Refusal(stage=stage, code=code):
            yield f"{begin}, {stage}: sends nothing but the error code {code}"
        case Arrival(stage=stage, client=client, arrays=arrays):
            yield f"{begin}, {stage}: {sum(array.bytes for array in arrays):,} bytes arrived from client {client}"
        case Failure(stage=stage, code=code):
            yield f"{begin}, {stage}: a client answered with the error code {code}"
        case Erasure(leaf=leaf):
            yield f"{begin}: a record was erased, {leaf[:16]}"
