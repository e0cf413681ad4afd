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
    mixtral = "mixtral"
    qwen2_moe = "qwen2-moe"


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    to: Annotated[
        Form,
        typer.Option(
            help="adapters: PEFT folders for an engine; transformers: the unified model, loaded with trust_remote_code and "
            "without this product; mixtral, qwen2-moe: the unified model in that architecture, where it holds it exactly; "
            "merged: one expert or a soup, as a dense model."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; replaced where it is there.")],
    expert: Annotated[str | None, typer.Option(help="Of --to merged: an expert's name, or soup for the mean of all.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Of --to mixtral and qwen2-moe: prompts, as 'metamoe model drift' takes them. Where the model is refused, the "
            "error says what share of the next tokens would change."
        ),
    ] = None,
) -> None:
    """Write a unified model as others read it. Adapters and what transformers loads are exact, Mixtral and Qwen2-MoE exact or
    refused (docs/use.md says for which settings); a merged model is one expert, or a soup, and never the unified model.
    """
    mixtures = {Form.mixtral, Form.qwen2_moe}
    if data is not None and to not in mixtures:
        raise InvalidSettingError(f"--data {data} is for --to mixtral and --to qwen2-moe; --to {to} is never refused")
    if (to is Form.merged) != (expert is not None):
        raise InvalidSettingError(f"--to merged wants --expert NAME, or --expert soup; --to {to} has all of them")
    from metamoe.export import export_adapters, export_merged, export_transformers

    if to in mixtures:
        # Not before it is needed: it loads architectures of transformers.
        from metamoe.mixture import export_mixture

        export_mixture(model, out, "mixtral" if to is Form.mixtral else "qwen2-moe", data)
        console.print(f"{out}: load it with AutoModelForCausalLM, as any model", markup=False, soft_wrap=True)
    elif to is Form.transformers:
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
