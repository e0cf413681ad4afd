"""The command ``metamoe gateway``."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.options import log


def gateway(
    folder: Annotated[
        Path, typer.Argument(help="The client's folder, with its keys and policy; the ledger is kept in its gateway/.")
    ],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the server is.")],
    host: Annotated[str, typer.Option(help="Address to listen on, for the client's SuperNode alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 9_095,
) -> None:
    """Stand between a client's SuperNode and the network, as its only way out: pass what its owner's policy allows, write it
    down first, and cut off everything else.
    """
    name, _, number = superlink.rpartition(":")
    if not name or not number.isdigit():
        raise InvalidSettingError(f"--superlink {superlink} is not of the form HOST:PORT")
    for file in ("ca.crt", "node.key", "policy.toml", "gateway.crt", "gateway.key"):
        if not (folder / file).is_file():
            raise InputFileError(f"{folder / file} is not there; make a client's folder with: metamoe client keys")
    # What is refused is said with --quiet too: it is what the owner looks for.
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    refusals = logging.getLogger("metamoe.gateway")
    refusals.handlers[:], refusals.propagate = [lines], False
    log.info("%s:%d to %s", host, port, superlink)
    from metamoe.audit.gateway.server import serve

    serve(folder.absolute(), superlink, host, port)
