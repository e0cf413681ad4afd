"""The command ``metamoe settings``."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text

from metamoe.described import described, in_groups, markdown, value_text
from metamoe.options import console, json_option, put_json


def settings(
    group: Annotated[
        str | None, typer.Argument(help="A group of settings, such as router, or one, such as router.top-k. (default: all)")
    ] = None,
    as_json: Annotated[bool, json_option("settings (name, group, type, default, choices, allowed in words, about)")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="All settings as a page: docs/settings.md.")] = False,
) -> None:
    """Show settings: their defaults, what is allowed, and what they are for. Any can be changed with --set NAME=VALUE."""
    if as_markdown:
        typer.echo(markdown(), nl=False)
        return
    if as_json:
        put_json({"settings": [asdict(setting) for setting in described(group)]})
        return
    # In a file, or for another program, a description is a line.
    soft_wrap = not console.is_terminal
    for name, about, members in in_groups(described(group)):
        if name:
            console.print(Text(f"{name}: {about}", "bold"), soft_wrap=soft_wrap)
        for setting in members:
            console.print(Text.assemble((setting.name, "cyan"), f" = {value_text(setting.default)}"), soft_wrap=soft_wrap)
            for line in (setting.allowed or setting.type, setting.about):
                console.print(Text(f"    {line}") if soft_wrap else Padding(Text(line), (0, 0, 0, 4)), soft_wrap=soft_wrap)
        console.print()
