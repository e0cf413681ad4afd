"""Asking a unified model: how good it is on a user's own samples, what it goes on to say, and which experts it asks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from metamoe.common.config import Data
from metamoe.common.data.images import image_dataset
from metamoe.common.data.metrics import interval, metrics_of
from metamoe.common.data.pictures import pictures_at
from metamoe.common.data.pixels import pixel_values
from metamoe.common.data.questions import read_questions, with_distractors
from metamoe.common.data.tasks import class_names, samples_of
from metamoe.common.data.text import chat_ids
from metamoe.common.errors import InputFileError
from metamoe.common.metrics import Metrics
from metamoe.common.model.artifact import Loaded
from metamoe.common.model.inputs import Inputs, prompt_tokens
from metamoe.predict import ImageInput, read_image
from metamoe.simulations.evaluate import answers_and_routing, mean_decision


@dataclass(frozen=True)
class Evaluation:
    """Accuracy in percent on ``count`` samples with its 95% interval (Wilson), each expert's share of the tokens, and what else
    a field asks for.
    """

    percent: float
    interval: tuple[float, float]
    count: int
    experts: list[tuple[str, float]]
    metrics: Metrics


def evaluate_on(loaded: Loaded, path: Path) -> Evaluation:
    """A unified model's accuracy on samples from disk.

    Args:
        loaded: the model.
        path: for a model of images a folder with one folder for each class, among whose names each image is named; for one of
            text a file of JSON lines. A table of paths and labels is as good as a folder.

    Raises:
        InputFileError: there is nothing there that the model takes.
        DataFormatError: a line is not a question.
    """
    manifest = loaded.manifest
    if loaded.seed.is_image_model:
        found = pictures_at(path, Data(background=manifest.background))
        if not found.parts["test"]:
            raise InputFileError(f"{path} has no images; expected are files such as CLASS NAME/1.png, or a table of them")
        samples, source = image_dataset(found.parts["test"], found.names, manifest.background), "images"
    else:
        source = "text" if manifest.text else "questions"
        reading = Data(source=source, list_choices=manifest.list_choices, block_words=manifest.block_words)
        samples = with_distractors(read_questions(path, reading))
        if not len(samples):
            raise InputFileError(f"{path} has no question with a label")
    data = Data(
        source=source,
        prompt=manifest.prompt,
        prompt_tokens=manifest.prompt_tokens,
        answer_tokens=manifest.answer_tokens,
    )
    with loaded.seed.place.computing():
        asked = samples_of(loaded.seed, data, [samples], class_names(samples))
        told, by_layer = answers_and_routing(loaded.model, asked)
    shares = torch.tensor(by_layer).mean(0).tolist()
    right = int(told.chosen.eq(asked.answers).sum())
    return Evaluation(
        100.0 * right / len(samples),
        interval(right, len(samples)),
        len(samples),
        sorted(zip(manifest.expert_names, shares, strict=True), key=lambda pair: -pair[1]),
        metrics_of(told, asked),
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
            asked: Inputs = pixel_values(loaded.seed, [read_image(given, loaded.manifest.background)])
        elif isinstance(given, str):
            ids = torch.tensor([prompt_ids(loaded, given)])
            asked = prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        else:
            raise InputFileError(f"this model is one of text; give it prompts, not {given}")
        with loaded.seed.place.computing():
            _, decisions = loaded.model(asked)
        pairs = zip(loaded.manifest.expert_names, mean_decision(decisions[-1], asked)[0].tolist(), strict=True)
        yield Decision(given, dict(sorted(pairs, key=lambda pair: -pair[1])))


def prompt_ids(loaded: Loaded, prompt: str) -> list[int]:
    """A prompt as the model's training had them: as a user's turn in the chat template, where that made them.

    Raises:
        InputFileError: it is empty.
    """
    tokenizer = loaded.seed.tokenizer
    if prompt.strip() and loaded.manifest.text and tokenizer.chat_template:
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise InputFileError("the prompt is empty")
    return ids
