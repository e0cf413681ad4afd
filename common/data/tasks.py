"""What "train" and "score" mean: images against the text features of class names, and questions with several choices."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from metamoe.common import config
from metamoe.common.batching import Fitting, by_tokens, fits
from metamoe.common.data.pixels import BATCH, Pixels, all_pixels, batches
from metamoe.common.data.text import AT_ONCE, Question, prompts, tokenised
from metamoe.common.errors import InvalidSettingError
from metamoe.common.model.batch import Batch, ImageBatch, TextBatch, packed, text_features
from metamoe.common.model.inputs import Inputs
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import batch_features

# Loading it takes half a second, which who asks a model about a file need not wait for.
if TYPE_CHECKING:
    from datasets import Dataset

_WINDOW = 4_096


class Samples(Protocol):
    """Samples that were decoded or tokenised once.

    Attributes:
        answers: int64 [N], the right class or choice of each.
        answer_tokens: int64 [N], tokens of each right answer; None where answers are classes.
    """

    @property
    def answers(self) -> Tensor: ...

    def batches(self) -> list[Tensor]:
        """Their rows in batches that are well computed together where the seed computes, in any order."""
        ...

    def cost(self, rows: Tensor) -> int:
        """What memory they take, in any measure that grows with it."""
        ...

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
    """Images [N, 3, H, W] told apart by unit text features of class names [C, p], ``at_once`` at a time."""

    pixels: Pixels | Tensor
    answers: Tensor
    texts: Tensor
    at_once: int = BATCH
    answer_tokens: None = None

    def batches(self) -> list[Tensor]:
        return list(torch.arange(len(self.answers)).split(self.at_once))

    def cost(self, rows: Tensor) -> int:
        return len(rows)

    def taught(self, rows: Tensor) -> ImageBatch:
        return ImageBatch(self.pixels[rows], self.answers[rows], self.texts)

    asked = taught


@dataclass(frozen=True)
class TextSamples:
    """Questions as tokens, the token that ends a text, and the tokens of a batch: None for a few questions in their order."""

    questions: Sequence[Question]
    end: int
    tokens_at_once: int | None = None

    def batches(self) -> list[Tensor]:
        if self.tokens_at_once:
            return by_tokens(self._lengths, self.tokens_at_once)
        return list(torch.arange(len(self.questions)).split(AT_ONCE))

    def cost(self, rows: Tensor) -> int:
        return _padded(self._lengths, rows)

    @cached_property
    def _lengths(self) -> Tensor:
        """Of each with all of its choices."""
        return torch.tensor([len(q.prompt) + sum(len(choice) - 1 for choice in q.choices) for q in self.questions])

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
        pixels, labels = all_pixels(seed, datasets, data.workers), torch.cat([labels_in(part, space) for part in datasets])
        return ImageSamples(pixels, labels, text_features(seed, space, data.prompt), _images_at_once(seed))
    questions = [question for part in datasets for question in tokenised(seed.tokenizer, data, part)]
    return TextSamples(questions, seed.tokenizer.eos_token_id, seed.place.tokens_at_once)


def _images_at_once(seed: Seed) -> int:
    """Images of a batch; of an image there is a token for each patch, and one for the whole."""
    vision, most = seed.model.config.vision_config, seed.place.tokens_at_once
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    return max(1, most // tokens) if most else BATCH


class Parts:
    """A training batch in parts of at most ``size`` samples (0: as a whole), and in smaller ones from then on where the device
    has not memory for them: the parts' gradients, weighted by their share of the loss, add up to the batch's.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def backward(
        self,
        samples: Samples,
        rows: Tensor,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Batch, Tensor, float], Tensor],
    ) -> Tensor:
        """Set the gradients of one step, and return its loss, a scalar without a gradient.

        Args:
            samples, rows: the batch.
            optimizer: of what is trained; its gradients are cleared first.
            loss: of a part, its rows, and its share of the batch's loss.

        Raises:
            NotEnoughMemoryError: one sample alone does not fit.
        """

        losses: list[Tensor] = []

        def step(size: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            losses.clear()
            for batch, part, share in in_parts(samples, rows, size):
                found = loss(batch, part, share)
                found.backward()
                losses.append(found.detach())

        # What failed on the way has left a part of the gradients: the whole step is taken again.
        size = min(self._size or len(rows), len(rows))
        while not fits(step, size):
            size = self._size = -(-size // 2)
        return torch.stack(losses).sum()


def in_parts(samples: Samples, rows: Tensor, size: int) -> list[tuple[Batch, Tensor, float]]:
    """A training batch in parts of at most ``size`` samples (0: as a whole), each with its rows and its share of the loss."""
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


def features(seed: Seed, model: PreTrainedModel, paths: list[str], data: config.Data, dataset: "Dataset") -> Iterator[Tensor]:
    """What :func:`metamoe.common.model.vectors.batch_features` says of every sample of a data set, in their order: of images,
    or of prompts without any choice's continuation.

    Args:
        seed: says what a model takes, and where it computes.
        model: the seed, or an expert.
        paths: sublayers whose mean inputs are wanted beside the embedding.
        data: settings of the data.
        dataset: the data set.
    """

    def found(inputs: Callable[[Tensor], Inputs], rows: Tensor) -> Tensor:
        return batch_features(model, paths, inputs(rows))

    if seed.is_image_model:
        fitting = Fitting()
        for pixels in batches(seed, dataset, _images_at_once(seed), data.workers):
            parts = fitting(partial(found, pixels.__getitem__), torch.arange(len(pixels)))
            yield from (part for _, part in parts)
        return
    questions = tokenised(seed.tokenizer, data, dataset)
    lengths = torch.tensor([len(question.prompt) for question in questions])
    fitting, most = Fitting(partial(_padded, lengths)), seed.place.tokens_at_once
    # Sorted within a window: what is computed in another order waits in memory for its turn.
    for window in torch.arange(len(questions)).split(_WINDOW if most else AT_ONCE):
        order = [window[rows] for rows in by_tokens(lengths[window], most)] if most else [window]
        pairs = [pair for rows in order for pair in fitting(partial(found, partial(prompts, questions)), rows)]
        computed = torch.cat([rows for rows, _ in pairs])
        yield torch.cat([part for _, part in pairs])[computed.argsort()]


def _padded(lengths: Tensor, rows: Tensor) -> int:
    """Tokens of a batch of these rows, with their padding."""
    return len(rows) * int(lengths[rows].max())


def class_names(dataset: "Dataset") -> list[str]:
    """Names of an image data set's classes; questions have none."""
    return list(dataset.features["label"].names) if "label" in dataset.features else []


def labels_in(dataset: "Dataset", space: Sequence[str]) -> Tensor:
    """The data set's labels as indices into a label space. int64 [N]."""
    index = {name: i for i, name in enumerate(space)}
    own = torch.tensor([index[name] for name in class_names(dataset)])
    return own[torch.tensor(dataset["label"], dtype=torch.long)]
