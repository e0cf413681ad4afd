"""The commands that give a unified model away."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metamoe.common.errors import InvalidSettingError
from metamoe.options import console


class Form(StrEnum):
    """What a model is exported to."""

    adapters = "adapters"
    merged = "merged"
    transformers = "transformers"


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    to: Annotated[
        Form,
        typer.Option(
            help="adapters: PEFT folders for an engine; transformers: the unified model, loaded with trust_remote_code and "
            "without this product; merged: one expert or a soup, as a dense model."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced where it is there.")],
    expert: Annotated[str | None, typer.Option(help="Of --to merged: an expert's name, or soup for the mean of all.")] = None,
) -> None:
    """Write a unified model as others read it. Adapters and what transformers loads are exact; a merged model is one expert, or
    a soup, and never the unified model.
    """
    if (to is Form.merged) != (expert is not None):
        raise InvalidSettingError(f"--to merged wants --expert NAME, or --expert soup; --to {to} has all of them")
    from metamoe.export import export_adapters, export_merged, export_transformers

    if to is Form.transformers:
        export_transformers(model, out)
        console.print(f"{out}: load it with trust_remote_code=True", markup=False, soft_wrap=True)
    elif expert is None:
        console.print(export_adapters(model, out), markup=False, highlight=False, soft_wrap=True)
    else:
        export_merged(model, out, expert)
        console.print(f"{out}: the seed with {expert} merged; not the unified model", markup=False, soft_wrap=True)


def push(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where, on the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
) -> None:
    """Upload a unified model with its card to the hub that 'hf auth login' is for. Read the card (README.md) first: it is what
    others see.
    """
    from metamoe.export import push_model

    console.print(push_model(model, repository, private), markup=False, highlight=False, soft_wrap=True)
