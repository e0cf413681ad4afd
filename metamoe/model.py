"""A unified model in Python."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args, overload

from PIL import Image
from torch import Tensor

from metamoe.ask import Decision, Evaluation, decisions_on, evaluate_on
from metamoe.common.compute import device_of, place
from metamoe.common.config import Precision
from metamoe.common.errors import InvalidSettingError
from metamoe.common.model.artifact import Loaded, Manifest, load_model
from metamoe.drift import Drift, drift_on
from metamoe.predict import ImageInput, Prediction, class_texts, predict_images
from metamoe.writing import Messages, Piece, Writing, written


@dataclass(frozen=True)
class Continuation:
    """What a model goes on to say.

    Attributes:
        prompt: a text, or the messages of a chat.
        text: what follows, without the stop text.
        experts: those that were asked with the mean over the new tokens of their weights, largest first.
        reason: why it ends: "stop" where the text does, or "length".
    """

    prompt: str | Messages
    text: str
    experts: list[tuple[str, float]]
    reason: str


@dataclass(frozen=True, eq=False)
class Model:
    """A unified model that is ready for use. ``loaded`` has the torch module and the seed model."""

    folder: Path
    loaded: Loaded = field(repr=False)

    @property
    def manifest(self) -> Manifest:
        """What the model was made of and with: experts, settings of LoRA and router, classes, hashes of its files."""
        return self.loaded.manifest

    @property
    def experts(self) -> list[str]:
        """Names of what the router chooses among: the experts, and the seed if it is one more."""
        return self.manifest.expert_names

    @property
    def classes(self) -> list[str]:
        """Names among which images are named unless others are given; none for a model of text."""
        return self.manifest.classes

    # A text is a sequence of texts too, which mypy minds.
    @overload
    def predict(  # type: ignore[overload-overlap]
        self, images: ImageInput, classes: Sequence[str] | None = None, top: int = 3
    ) -> Prediction: ...
    @overload
    def predict(self, images: Sequence[ImageInput], classes: Sequence[str] | None = None, top: int = 3) -> list[Prediction]: ...
    def predict(
        self, images: ImageInput | Sequence[ImageInput], classes: Sequence[str] | None = None, top: int = 3
    ) -> Prediction | list[Prediction]:
        """Name the most likely classes of images.

        Args:
            images: files or PIL images of any size and mode, or one of them.
            classes: names of the classes to choose among; None for the model's own.
            top: how many classes to name.

        Returns:
            A prediction for each image; for one, that.

        Raises:
            InputFileError: a file is not a readable image, there is no class, or the model is one of text.
            InvalidSettingError: ``top`` is less than one.
        """
        if isinstance(images, str | PathLike | Image.Image):
            return self.predict([images], classes, top)[0]
        _at_least_one("top", top)
        names = self.classes if classes is None else list(dict.fromkeys(classes))
        texts = self._texts if classes is None else class_texts(self.loaded, names)
        return list(predict_images(self.loaded, images, names, texts, top))

    @overload
    def generate(self, prompts: str, max_tokens: int = 64, **how: Any) -> Continuation: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[str], max_tokens: int = 64, **how: Any) -> list[Continuation]: ...
    def generate(self, prompts: str | Sequence[str], max_tokens: int = 64, **how: Any) -> Continuation | list[Continuation]:
        """Go on from prompts, many at once; each gets what it would get alone.

        Args:
            prompts: texts, or one.
            max_tokens: how many new tokens at most, for each.
            how: ``temperature`` (0 takes the most likely token each time), ``top_p``, ``seed``, ``stop`` texts and
                ``truncate``, as in :class:`metamoe.Writing`.

        Returns:
            What follows each prompt; for one, that.

        Raises:
            InputFileError: the model is one of images, or a prompt is empty or too long.
            InvalidSettingError: ``max_tokens`` or one of ``how`` is out of its bounds.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], max_tokens, **how)[0]
        return self._continued(prompts, _writing(max_tokens, how))

    def chat(self, messages: Messages, max_tokens: int = 64, **how: Any) -> Continuation:
        """Answer a chat, put into the seed's template.

        Args:
            messages: each with ``role`` (system, user, assistant) and ``content``.
            max_tokens, how: as for :meth:`generate`.

        Raises:
            InputFileError: as for :meth:`generate`, or the seed's tokenizer has no template.
        """
        return self._continued([messages], _writing(max_tokens, how))[0]

    def stream(self, prompt: str | Messages, max_tokens: int = 64, **how: Any) -> Iterator[str]:
        """Go on from a prompt or answer a chat, piece by piece, as :meth:`generate` and :meth:`chat` do."""
        return (piece.text for _, piece in written(self.loaded, [prompt], _writing(max_tokens, how)) if piece.text)

    def score(self, path: str | PathLike[str]) -> Evaluation:
        """Accuracy on labelled samples from disk, in percent, with its 95% interval.

        Args:
            path: for a model of images a folder with one folder for each class, among whose names each image is named, or a
                table of them; for one of text a file of questions or text (docs/data.md).

        Raises:
            InputFileError: there is nothing there that the model takes.
            DataFormatError: a row is in no layout that is known.
        """
        return evaluate_on(self.loaded, Path(path))

    @overload
    def route(self, inputs: ImageInput) -> Decision: ...  # type: ignore[overload-overlap]
    @overload
    def route(self, inputs: Sequence[ImageInput]) -> list[Decision]: ...
    def route(self, inputs: ImageInput | Sequence[ImageInput]) -> Decision | list[Decision]:
        """Which expert the model would ask, and how sure it is: the mean over an image's tokens, or a prompt's, of the
        probabilities in the highest layer that decides.

        Args:
            inputs: files or PIL images, or one of them; for a model of text prompts, or one.

        Returns:
            A decision for each input; for one, that.

        Raises:
            InputFileError: a file is not a readable image, a prompt is empty, or the model is one of text and given an image.
        """
        if isinstance(inputs, str | PathLike | Image.Image):
            return self.route([inputs])[0]
        return list(decisions_on(self.loaded, inputs))

    def drift(self, path: str | PathLike[str]) -> Drift:
        """How many inputs are near to no client, by the Gaussians that route: many of them tell that a client is missing.

        Args:
            path: for a model of images a folder with pictures in it, at any depth, or one of them; for one of text a file of
                questions or text, or ``.txt`` with a prompt a line.

        Raises:
            InputFileError: there is nothing there that the model takes.
            DataFormatError: a row is in no layout that is known.
            InvalidSettingError: the model's router has no Gaussians, or none of the public set.
        """
        return drift_on(self.loaded, Path(path))

    @cached_property
    def _texts(self) -> Tensor:
        """Features of the model's own classes, of which there can be thousands."""
        return class_texts(self.loaded, self.classes)

    def _continued(self, prompts: Sequence[str | Messages], how: Writing) -> list[Continuation]:
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for number, piece in written(self.loaded, prompts, how):
            pieces[number].append(piece)
        return [continuation(prompt, own, self.experts) for prompt, own in zip(prompts, pieces, strict=True)]


def continuation(prompt: str | Messages, pieces: Sequence[Piece], experts: Sequence[str]) -> Continuation:
    """The pieces of a text as one."""
    shares = [sum(piece.weights[k] for piece in pieces) / len(pieces) for k in range(len(experts))]
    asked = sorted(((name, share) for name, share in zip(experts, shares, strict=True) if share > 0), key=lambda pair: -pair[1])
    return Continuation(prompt, "".join(piece.text for piece in pieces), asked, pieces[-1].reason or "")


def _writing(max_tokens: int, how: dict[str, Any]) -> Writing:
    if unknown := sorted(how.keys() - {field.name for field in fields(Writing)}):
        raise InvalidSettingError(f"{unknown[0]} = {how[unknown[0]]!r}: there is no such option of a text")
    return Writing(max_tokens, **how)


def load(folder: str | PathLike[str], device: str = "auto", precision: Literal["float32", "bfloat16"] = "float32") -> Model:
    """Load a unified model, after checking every file's hash and the seed's.

    Args:
        folder: the model's, such as runs/demo/model.
        device: where it computes: auto, cpu or cuda:N.
        precision: of matrix products; in bfloat16, a seed that is stored so is held so on a GPU.

    Raises:
        ModelFileError: a file is missing, added or changed.
        SeedMismatchError: the seed model here is not the one it was made from.
        InvalidSettingError: there is no such device, or it does not compute in this precision.
    """
    if precision not in get_args(Precision):
        raise InvalidSettingError(f"precision = {precision!r} is none of {', '.join(get_args(Precision))}")
    return Model(Path(folder).absolute(), load_model(Path(folder), place(device_of(device), precision)))


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InvalidSettingError(f"{name} = {value}: at least 1 is needed")
