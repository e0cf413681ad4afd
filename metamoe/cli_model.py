"""The commands that ask a unified model."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from metamoe.common.errors import InvalidSettingError
from metamoe.options import Device, Precise, Precision, console, json_option, notes, put_json


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
        Path,
        typer.Option(help="A folder with a folder of images for each class, a table of them, or a file of questions or text."),
    ],
    task: Annotated[Task | None, typer.Option(help="What the model must be for. (default: what it is for)")] = None,
    device: Device = "auto",
    precision: Precise = Precision.float32,
    as_json: Annotated[
        bool,
        json_option("task, percent (accuracy), interval, count (samples), experts (each one's share of tokens), metrics"),
    ] = False,
) -> None:
    """Measure a unified model on labelled samples of your own: accuracy with its 95% interval, other metrics, and which
    experts were used.
    """
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
    what = "told from others' answers" if loaded.manifest.text else "accuracy"
    console.print(f"{what}: {result.percent:.1f}% [{low:.1f}, {high:.1f}] on {result.count} {own}", markup=False)
    others = {name: value for name, value in asdict(result.metrics).items() if isinstance(value, float) and name != "accuracy"}
    console.print(", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in others.items()), markup=False)
    shares = ", ".join(f"{expert} {share:.1%}" for expert, share in result.experts if share > 0)
    console.print(f"tokens went to: {shares}", markup=False, soft_wrap=True)
