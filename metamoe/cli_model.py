"""The commands that ask a unified model."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metamoe.common.errors import InvalidSettingError
from metamoe.options import console, json_option, log, notes, put_json


class Precision(StrEnum):
    """Of matrix products."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Device = Annotated[str, typer.Option(help="Where it computes: auto (a GPU where there is one), cpu or cuda:N.")]
Precise = Annotated[Precision, typer.Option(help="Of matrix products; bfloat16 is for GPUs.")]


class Task(StrEnum):
    """What a model is for."""

    images = "images"
    questions = "questions"


def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 3,
    classes: Annotated[Path | None, typer.Option(help="Text file with the class names to choose among, one a line.")] = None,
    device: Device = "auto",
    precision: Precise = Precision.float32,
    as_json: Annotated[
        bool,
        json_option("a line an image: image, classes (name, probability), experts (each one's share of tokens)"),
    ] = False,
) -> None:
    """Name the most likely classes of images, and show which experts their tokens went to."""
    from metamoe.model import load
    from metamoe.predict import class_texts, predict_images, read_class_names

    loaded = load(model, device, precision.value).loaded
    names = read_class_names(classes) if classes else loaded.manifest.classes
    for prediction in predict_images(loaded, images, names, class_texts(loaded, names), top):
        if as_json:
            classes_ = [{"name": name, "probability": probability} for name, probability in prediction.classes]
            put_json({"image": str(prediction.image), "classes": classes_, "experts": dict(prediction.experts)})
            continue
        console.print(str(prediction.image), style="bold", markup=False, highlight=False, soft_wrap=True)
        for name, probability in prediction.classes:
            console.print(f"  {probability:6.1%}  {name}", markup=False, soft_wrap=True)
        shares = ", ".join(f"{expert} {share:.0%}" for expert, share in prediction.experts if share > 0)
        console.print(f"  tokens went to: {shares}", markup=False, soft_wrap=True)


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model, e.g. runs/demo/model.")],
    data: Annotated[
        Path, typer.Option(help="A folder with a folder of images for each class, or a file of questions (.jsonl, .jsonl.gz).")
    ],
    task: Annotated[Task | None, typer.Option(help="What the model must be for. (default: what it is for)")] = None,
    device: Device = "auto",
    precision: Precise = Precision.float32,
    as_json: Annotated[
        bool,
        json_option("task, percent (accuracy), interval, count (samples), experts (each one's share of tokens)"),
    ] = False,
) -> None:
    """Measure a unified model on labelled samples of your own: accuracy with its 95% interval, and which experts were used."""
    from metamoe.ask import evaluate_on
    from metamoe.model import load

    loaded = load(model, device, precision.value).loaded
    own = Task.images if loaded.seed.is_image_model else Task.questions
    if task not in (None, own):
        raise InvalidSettingError(f"--task {task}: {model} is a model for {own}")
    with notes.status("evaluating"):
        result = evaluate_on(loaded, data)
    if as_json:
        put_json({"task": own, **asdict(result), "experts": dict(result.experts)})
        return
    low, high = result.interval
    console.print(f"accuracy: {result.percent:.1f}% [{low:.1f}, {high:.1f}] on {result.count} {own}", markup=False)
    shares = ", ".join(f"{expert} {share:.1%}" for expert, share in result.experts if share > 0)
    console.print(f"tokens went to: {shares}", markup=False, soft_wrap=True)


def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a unified model made from a decoder.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    device: Device = "auto",
    precision: Precise = Precision.float32,
) -> None:
    """Go on from a prompt, taking the most likely token each time, and show which experts were asked."""
    from collections import Counter

    from metamoe.ask import spoken
    from metamoe.model import load

    experts: Counter[str] = Counter()
    for text, expert in spoken(load(model, device, precision.value).loaded, prompt, max_tokens):
        typer.echo(text, nl=False)
        experts[expert] += 1
    typer.echo()
    asked = ", ".join(f"{expert} {count / experts.total():.0%}" for expert, count in experts.most_common())
    log.info("tokens went to: %s", asked)
