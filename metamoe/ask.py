"""Asking a unified model: how good it is on a user's own samples, what it goes on to say, and which experts it asks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import binomtest

from metamoe.common.config import Data
from metamoe.common.data.images import class_folders, image_dataset, image_files
from metamoe.common.data.pixels import pixel_values
from metamoe.common.data.questions import read_questions
from metamoe.common.data.tasks import class_names, samples_of
from metamoe.common.errors import InputFileError
from metamoe.common.model.artifact import Loaded
from metamoe.common.model.generation import generate
from metamoe.common.model.inputs import Inputs, prompt_tokens
from metamoe.predict import ImageInput, read_image
from metamoe.simulations.evaluate import accuracy_and_routing, mean_decision


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in percent on ``count`` samples with its 95% interval (Wilson), and each expert's share of the tokens."""

    percent: float
    interval: tuple[float, float]
    count: int
    experts: list[tuple[str, float]]


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share of ``right`` in ``count`` (Wilson 1927), in percent."""
    found = binomtest(right, count).proportion_ci(method="wilson")
    return 100 * float(found.low), 100 * float(found.high)


def evaluate_on(loaded: Loaded, path: Path) -> Evaluation:
    """A unified model's accuracy on samples from disk.

    Args:
        loaded: the model.
        path: for a model of images a folder with one folder for each class, among whose names each image is named; for one of
            text a file of JSON lines.

    Raises:
        InputFileError: there is nothing there that the model takes.
        DataFormatError: a line is not a question.
    """
    manifest = loaded.manifest
    if loaded.seed.is_image_model:
        names = class_folders(path)
        files = image_files(path, names)
        if not files:
            raise InputFileError(f"{path} has no images; expected are files such as CLASS NAME/1.png")
        samples, source = image_dataset(files, names), "images"
    else:
        samples, source = read_questions(path, manifest.list_choices), "questions"
        if not len(samples):
            raise InputFileError(f"{path} has no question with a label")
    data = Data(
        source=source,
        prompt=manifest.prompt,
        prompt_tokens=manifest.prompt_tokens,
        answer_tokens=manifest.answer_tokens,
    )
    with loaded.seed.place.computing():
        ready = samples_of(loaded.seed, data, [samples], class_names(samples))
        percent, by_layer = accuracy_and_routing(loaded.model, ready)
    shares = torch.tensor(by_layer).mean(0).tolist()
    right = round(percent * len(samples) / 100)
    return Evaluation(
        percent,
        interval(right, len(samples)),
        len(samples),
        sorted(zip(manifest.expert_names, shares, strict=True), key=lambda pair: -pair[1]),
    )


@dataclass(frozen=True)
class Decision:
    """How a model routes an image or a prompt: the probability of each expert, largest first; they sum to one.

    Attributes:
        input: as it was given.
        probabilities: the mean over the tokens of what the highest layer that decides gives each expert.
    """

    input: ImageInput
    probabilities: dict[str, float]

    @property
    def expert(self) -> str:
        """The most likely expert."""
        return next(iter(self.probabilities))

    @property
    def probability(self) -> float:
        """How sure the model is of that expert, from 0 to 1."""
        return self.probabilities[self.expert]


@torch.inference_mode()
def decisions_on(loaded: Loaded, inputs: Iterable[ImageInput]) -> Iterator[Decision]:
    """How a model routes images or prompts, one at a time.

    Args:
        loaded: the model.
        inputs: for a model of images, files or images; for one of text, prompts.

    Raises:
        InputFileError: a file is not a readable image, a prompt is empty, or the model is one of text and is given an image.
    """
    for given in inputs:
        if loaded.seed.is_image_model:
            asked: Inputs = pixel_values(loaded.seed, [read_image(given)])
        elif isinstance(given, str):
            ids = torch.tensor([_prompt_ids(loaded, given)])
            asked = prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        else:
            raise InputFileError(f"this model is one of text; give it prompts, not {given}")
        with loaded.seed.place.computing():
            _, decisions = loaded.model(asked)
        pairs = zip(loaded.manifest.expert_names, mean_decision(decisions[-1], asked)[0].tolist(), strict=True)
        yield Decision(given, dict(sorted(pairs, key=lambda pair: -pair[1])))


def spoken(loaded: Loaded, prompt: str, most: int) -> Iterator[tuple[str, str]]:
    """What the model goes on to say, piece by piece, each with the expert that it went to in the highest layer that decides.

    Raises:
        InputFileError: the model is one of images, or the prompt is empty.
    """
    if loaded.seed.is_image_model:
        raise InputFileError("this model is one of images; ask it with 'metamoe predict'")
    tokenizer, ids = loaded.seed.tokenizer, _prompt_ids(loaded, prompt)
    # A token can be a part of a letter, so text is what the whole reads beyond what was read before.
    made: list[int] = []
    before = ""
    steps = generate(loaded.model, ids, tokenizer.eos_token_id, most)
    while True:
        # Around each step alone: whoever reads on meanwhile computes as before.
        with loaded.seed.place.computing():
            step = next(steps, None)
        if step is None:
            return
        token, routing = step
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        yield text[len(before) :], loaded.manifest.expert_names[int(routing[-1].argmax())]
        before = text


def _prompt_ids(loaded: Loaded, prompt: str) -> list[int]:
    ids: list[int] = loaded.seed.tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputFileError("the prompt is empty")
    return ids
