"""The commands that have a unified model of text go on from prompts, and talk."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from metamoe.common.errors import InputFileError
from metamoe.options import Device, Precise, Precision, json_option, log, put_json

ModelFolder = Annotated[Path, typer.Argument(help="Folder of a unified model made from a decoder.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="How many tokens at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time; above it one is drawn.")]
TopP = Annotated[float, typer.Option(help="Draw out of the likeliest tokens that have this probability together.")]
Seed = Annotated[int | None, typer.Option(help="Of the draws. (default: others each time)")]


def generate(
    model: ModelFolder,
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Texts to go on from. (default: standard input, a line a prompt)")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Prompts, a line each; of a .jsonl file, JSON with prompt or messages.")
    ] = None,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text before which to end; repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the seed's chat template.")] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Keep the end of a prompt that is too long, in place of refusing it.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, help="Prompts that are computed together.")] = 32,
    device: Device = "auto",
    precision: Precise = Precision.float32,
    as_json: Annotated[
        bool, json_option("a line a prompt, in their order: prompt, text, experts (each one's mean weight), reason")
    ] = False,
) -> None:
    """Go on from prompts, and show which experts were asked. One prompt is shown as it is written; each gets what it would get
    alone.
    """
    # Whatever is wrong with the prompts is said before the model is loaded.
    prompts = _prompts(prompt, file, chat)
    from metamoe.model import continuation, load
    from metamoe.writing import Piece, Writing, written

    how = Writing(max_tokens, temperature, top_p, seed, tuple(stop or ()), truncate)
    loaded, shown = load(model, device, precision.value).loaded, 0
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for number, piece in written(loaded, prompts, how, at_once):
        pieces[number].append(piece)
        if len(prompts) == 1 and not as_json:
            typer.echo(piece.text, nl=False)
        # In the order of the prompts, whichever ends first.
        while shown < len(prompts) and pieces[shown] and pieces[shown][-1].reason:
            done = continuation(prompts[shown], pieces[shown], loaded.manifest.expert_names)
            if as_json:
                put_json({"prompt": done.prompt, "text": done.text, "experts": dict(done.experts), "reason": done.reason})
            else:
                typer.echo("" if len(prompts) == 1 else done.text)
                log.info("experts: %s", ", ".join(f"{name} {weight:.0%}" for name, weight in done.experts))
            shown += 1


def _prompts(arguments: list[str] | None, file: Path | None, chat: bool) -> "list[str | list[dict[str, str]]]":
    """What a command was given to go on from, in one of three ways.

    Raises:
        InputFileError: nothing was given, two things were, or a file is not what it should be.
    """
    if arguments and file:
        raise InputFileError(f"--file {file}: prompts were given as arguments too; give one of them")
    found: list[str | list[dict[str, str]]] = []
    if arguments:
        found += arguments
    else:
        place = f"--file {file}" if file else "standard input"
        try:
            lines = (file.read_text() if file else sys.stdin.read()).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputFileError(f"{place} cannot be read: {error}") from error
        as_lines = file is not None and file.suffix == ".jsonl"
        found += [_of_line(line, f"{place}, line {n}") if as_lines else line for n, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise InputFileError(f"{place} has no prompt")
    return [[{"role": "user", "content": one}] if chat and isinstance(one, str) else one for one in found]


@dataclass
class _Line:
    """A line of a file of prompts."""

    prompt: str | None = None
    messages: list[dict[str, str]] | None = None


def _of_line(line: str, place: str) -> str | list[dict[str, str]]:
    from pydantic import TypeAdapter, ValidationError

    from metamoe.common.errors import first_problem

    try:
        read = TypeAdapter(_Line).validate_json(line)
    except ValidationError as error:
        raise InputFileError(f"{place}: {first_problem(error)}") from error
    one = read.prompt if read.prompt is not None else read.messages
    if not one or (read.prompt and read.messages):
        raise InputFileError(f"{place}: expected {json.dumps({'prompt': 'TEXT'})} or {json.dumps({'messages': []})}, filled")
    return one


def chat(
    model: ModelFolder,
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = "auto",
    precision: Precise = Precision.float32,
) -> None:
    """Talk with a unified model, a message a line; an empty line or the end of input ends it. When a talk is longer than the
    seed can read, its beginning is forgotten.
    """
    from metamoe.model import continuation, load
    from metamoe.writing import Writing, check_text, written

    how = Writing(max_tokens, temperature, top_p, seed, truncate=True)
    loaded = load(model, device, precision.value).loaded
    check_text(loaded)
    messages = [{"role": "system", "content": system}] if system else []
    while said := _said():
        messages.append({"role": "user", "content": said})
        pieces = []
        for _, piece in written(loaded, [messages], how):
            typer.echo(piece.text, nl=False)
            pieces.append(piece)
        typer.echo()
        answer = continuation(messages, pieces, loaded.manifest.expert_names)
        log.info("experts: %s", ", ".join(f"{name} {weight:.0%}" for name, weight in answer.experts))
        messages.append({"role": "assistant", "content": answer.text})


def _said() -> str:
    """The next line; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
