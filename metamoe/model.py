"""A unified model in Python."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Literal, get_args, overload

from PIL import Image
from torch import Tensor

from metamoe.ask import Decision, Evaluation, decisions_on, evaluate_on, spoken
from metamoe.common.compute import device_of, place
from metamoe.common.config import Precision
from metamoe.common.errors import InvalidSettingError
from metamoe.common.model.artifact import Loaded, Manifest, load_model
from metamoe.predict import ImageInput, Prediction, class_texts, predict_images


@dataclass(frozen=True)
class Continuation:
    """What a model goes on to say, and each expert's share of the new tokens, largest first; none if it says nothing."""

    prompt: str
    text: str
    experts: list[tuple[str, float]]


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
    def generate(self, prompts: str, max_tokens: int = 64) -> Continuation: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[str], max_tokens: int = 64) -> list[Continuation]: ...
    def generate(self, prompts: str | Sequence[str], max_tokens: int = 64) -> Continuation | list[Continuation]:
        """Go on from prompts, taking the most likely token each time.

        Args:
            prompts: texts, or one.
            max_tokens: how many new tokens at most, for each.

        Returns:
            What follows each prompt; for one, that.

        Raises:
            InputFileError: the model is one of images, or a prompt is empty.
            InvalidSettingError: ``max_tokens`` is less than one.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], max_tokens)[0]
        _at_least_one("max_tokens", max_tokens)
        return [self._continued(prompt, max_tokens) for prompt in prompts]

    def score(self, path: str | PathLike[str]) -> Evaluation:
        """Accuracy on labelled samples from disk, in percent, with its 95% interval.

        Args:
            path: for a model of images a folder with one folder for each class, among whose names each image is named; for one
                of text a file of JSON lines (.jsonl, .jsonl.gz).

        Raises:
            InputFileError: there is nothing there that the model takes.
            DataFormatError: a line is not a question.
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

    @cached_property
    def _texts(self) -> Tensor:
        """Features of the model's own classes, of which there can be thousands."""
        return class_texts(self.loaded, self.classes)

    def _continued(self, prompt: str, most: int) -> Continuation:
        pieces = list(spoken(self.loaded, prompt, most))
        counts = Counter(expert for _, expert in pieces)
        experts = [(expert, count / len(pieces)) for expert, count in counts.most_common()]
        return Continuation(prompt, "".join(text for text, _ in pieces), experts)


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
