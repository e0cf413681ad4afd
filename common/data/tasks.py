"""What "train" and "score" mean: images against the text features of class names, and questions with several choices."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from metamoe.common import config
from metamoe.common.data.text import Question, prompt_batches, tokenised
from metamoe.common.errors import InvalidSettingError
from metamoe.common.model.batch import Batch, ImageBatch, Scores, TextBatch, packed, text_features
from metamoe.common.model.inputs import Inputs
from metamoe.common.model.seed import Seed

# Loading it takes half a second, which who asks a model about a file need not wait for.
if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 256


class Samples(Protocol):
    """Samples that were decoded or tokenised once.

    Attributes:
        answers: int64 [N], the right class or choice of each.
        at_once: how many of them are well computed together.
        answer_tokens: int64 [N], tokens of each right answer; None where answers are classes.
    """

    @property
    def answers(self) -> Tensor: ...

    @property
    def at_once(self) -> int: ...

    @property
    def answer_tokens(self) -> Tensor | None: ...

    def taught(self, rows: Tensor) -> Batch:
        """These samples with what is to be learned."""
        ...

    def asked(self, rows: Tensor) -> Batch:
        """These samples with all that they are to choose among."""
        ...


@dataclass(frozen=True)
class ImageSamples:
    """Images [N, 3, H, W] told apart by unit text features of class names [C, p]."""

    pixels: Tensor
    answers: Tensor
    texts: Tensor
    at_once: int = _BATCH
    answer_tokens: None = None

    def taught(self, rows: Tensor) -> ImageBatch:
        return ImageBatch(self.pixels[rows], self.answers[rows], self.texts)

    asked = taught


@dataclass(frozen=True)
class TextSamples:
    """Questions as tokens, and the token that ends a text."""

    questions: Sequence[Question]
    end: int
    # Few, as all are padded to the longest.
    at_once: int = 4

    @cached_property
    def answers(self) -> Tensor:
        return torch.tensor([question.answer for question in self.questions])

    @cached_property
    def answer_tokens(self) -> Tensor:
        return torch.tensor([len(question.choices[question.answer]) for question in self.questions])

    def taught(self, rows: Tensor) -> TextBatch:
        """Each prompt with its right choice and the end of the text."""
        questions = [self.questions[row] for row in rows.tolist()]
        return TextBatch(*packed([(q.prompt, [[*q.choices[q.answer], self.end]]) for q in questions]))

    def asked(self, rows: Tensor) -> TextBatch:
        """Each prompt with all of its choices, none of which sees another."""
        questions = [self.questions[row] for row in rows.tolist()]
        return TextBatch(*packed([(q.prompt, q.choices) for q in questions]))


def samples_of(seed: Seed, data: config.Data, datasets: Sequence["Dataset"], space: Sequence[str]) -> Samples:
    """Data sets one after the other, ready for a seed.

    Args:
        seed: the seed.
        data: settings of the data.
        datasets: of images, or of questions.
        space: for images, the names of the classes that are told apart.

    Raises:
        InvalidSettingError: the seed is for another kind of data.
    """
    check_seed(seed, data)
    if seed.is_image_model:
        pixels = all_pixels(seed, datasets, data.workers)
        return ImageSamples(
            pixels, torch.cat([labels_in(part, space) for part in datasets]), text_features(seed, space, data.prompt)
        )
    questions = [question for part in datasets for question in tokenised(seed.tokenizer, data, part)]
    return TextSamples(questions, seed.tokenizer.eos_token_id)


def in_parts(samples: Samples, rows: Tensor, size: int) -> list[tuple[Batch, Tensor, float]]:
    """A training batch in parts of at most ``size`` samples (0: as a whole), each with its rows and its share of the loss: the
    parts' gradients, weighted so, add up to the batch's.
    """
    parts = [(samples.taught(some), some) for some in rows.split(size or len(rows))]
    total = sum(batch.count for batch, _ in parts)
    return [(batch, some, batch.count / total) for batch, some in parts]


def check_seed(seed: Seed, data: config.Data) -> None:
    """Raise unless the seed takes this kind of data.

    Raises:
        InvalidSettingError: it does not.
    """
    if seed.is_image_model == data.is_text:
        kind = "a CLIP model, for images" if seed.is_image_model else "a decoder, for questions and text"
        raise InvalidSettingError(f"seed-model = {seed.reference!r} is {kind}; it does not go with data.source = {data.source}")


def input_batches(seed: Seed, data: config.Data, dataset: "Dataset") -> Iterator[Inputs]:
    """What the seed sees of a data set, in order: images, or prompts without any choice's continuation."""
    if seed.is_image_model:
        return batches(seed, dataset, workers=data.workers)
    return prompt_batches(tokenised(seed.tokenizer, data, dataset))


def pixel_values(seed: Seed, images: Sequence[object]) -> Tensor:
    """PIL images as the seed's input. float32 [B, 3, H, W]."""
    return seed.processor(images=list(images), return_tensors="pt")["pixel_values"]


def batches(seed: Seed, dataset: "Dataset", size: int = _BATCH, workers: int = 0) -> Iterator[Tensor]:
    """A data set's images in order, ``size`` at a time, decoded ahead of their use by ``workers`` processes; by none, here.
    float32 [<= size, 3, H, W].
    """
    # Its own generator: a loader draws from it, and the run's random numbers must not depend on that.
    own = torch.Generator()
    return iter(DataLoader(dataset, size, num_workers=workers, collate_fn=partial(_collated, seed), generator=own))


def _collated(seed: Seed, rows: Sequence[dict[str, Any]]) -> Tensor:
    return pixel_values(seed, [row["image"] for row in rows])


def all_pixels(seed: Seed, datasets: Sequence["Dataset"], workers: int = 0) -> Tensor:
    """All images of small data sets one after the other, decoded once. float32 [N, 3, H, W]."""
    vision = seed.model.config.vision_config
    pixels = torch.empty(sum(map(len, datasets)), vision.num_channels, vision.image_size, vision.image_size)
    # Filled, not joined, which would need them twice.
    done = 0
    for dataset in datasets:
        for batch in batches(seed, dataset, workers=workers):
            pixels[done : done + len(batch)] = batch
            done += len(batch)
    return pixels


def class_names(dataset: "Dataset") -> list[str]:
    """Names of an image data set's classes; questions have none."""
    return list(dataset.features["label"].names) if "label" in dataset.features else []


def labels_in(dataset: "Dataset", space: Sequence[str]) -> Tensor:
    """The data set's labels as indices into a label space. int64 [N]."""
    index = {name: i for i, name in enumerate(space)}
    own = torch.tensor([index[name] for name in class_names(dataset)])
    return own[torch.tensor(dataset["label"], dtype=torch.long)]


@torch.inference_mode()
def predictions(scores: Scores, samples: Samples) -> Tensor:
    """Best class or choice of every sample. int64 [N]."""
    rows = torch.arange(len(samples.answers)).split(samples.at_once)
    return torch.cat([scores(samples.asked(some)).argmax(1).cpu() for some in rows])


def accuracy(scores: Scores, samples: Samples) -> float:
    """Share of samples whose best class or choice is the right one, in percent."""
    return 100.0 * predictions(scores, samples).eq(samples.answers).float().mean().item()
