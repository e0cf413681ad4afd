"""The frozen seed model M0: loading, fingerprint, feed-forward sublayers."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPModel,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from metamoe.common.compute import ON_CPU, Place
from metamoe.common.errors import HubError, InputFileError
from metamoe.common.hub import HUB_FAILURES, hub_error
from metamoe.common.model.ffn import Form, ffn_paths, form_of
from metamoe.common.model.gguf import from_gguf, packaged_gguf
from metamoe.common.model.inputs import is_image_model

_TOWER = ("hidden_act", "num_attention_heads", "layer_norm_eps", "patch_size", "image_size")
_DECODER = (
    *("hidden_act", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters"),
    *("sliding_window", "layer_types"),
)
_PROCESSOR = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)


@dataclass(frozen=True)
class Seed:
    """A frozen seed model with what turns names, text and images into its inputs. Shared within a process: never modified.

    ``model`` is a CLIP model, or a decoder for text, which has no ``processor``. It computes at ``place``; ``stored`` is the
    seed as it was loaded, where this one is held otherwise.
    """

    reference: str
    model: Any
    tokenizer: Any
    processor: Any
    place: Place = ON_CPU
    stored: "Seed | None" = None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the seed's output: every parameter's name, shape and numbers as they are stored, the
        settings of the model's layers and of the image processor, and the tokenizer's words.

        Numbers are taken as float32, which holds every bfloat16 and float16 exactly: two parties agree however each of them
        holds the seed.
        """
        if self.stored is not None:
            return self.stored.fingerprint
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            numbers = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(f"{name} {numbers.dtype} {tuple(numbers.shape)}\n".encode())
            digest.update(numbers.cpu().reshape(-1).view(torch.uint8).numpy())
        # By name: the files hold much else, such as versions and paths, that may differ between places.
        config = self.model.config
        if is_image_model(self.model):
            parts = [(config.vision_config, _TOWER), (config.text_config, _TOWER), (self.processor, _PROCESSOR)]
        else:
            parts = [(config, _DECODER)]
        for part, names in parts:
            digest.update(repr([(name, _plain(getattr(part, name, None))) for name in names]).encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()

    @cached_property
    def ffn_paths(self) -> list[str]:
        return ffn_paths(self.model)

    @cached_property
    def form(self) -> Form:
        """The form that all its feed-forward sublayers have."""
        form = form_of(self.model.get_submodule(self.ffn_paths[0]))
        assert form is not None
        return form

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, as they are held."""
        return self.model.get_parameter(f"{self.ffn_paths[0]}.{self.form.down}.weight").dtype

    @property
    def computed_by(self) -> str:
        """What now decides the last digits of what it computes, beside libraries and threads: device, weights and precision;
        empty for float32 on a CPU.
        """
        device = self.model.device.type
        coarse = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        usual = device == "cpu" and self.dtype == torch.float32 and not coarse
        return "" if usual else f" {device} {self.dtype} {'bfloat16' if coarse else 'float32'}"

    @property
    def is_image_model(self) -> bool:
        """Whether it takes images; otherwise text."""
        return is_image_model(self.model)

    @property
    def width(self) -> int:
        """d, the width of the residual stream and of every routing vector."""
        config = self.model.config
        return config.vision_config.hidden_size if self.is_image_model else config.hidden_size


def _plain(value: Any) -> Any:
    """A setting in a form whose text is the same everywhere."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return sorted((key, entry) for key, entry in value.items() if entry is not None)
    return list(value) if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=1)
def load_seed(reference: str) -> Seed:
    """Load a seed once per process, in the dtype that its config says it is stored in; :func:`seed_at` has it ready to compute.

    Args:
        reference: ``"glyphs"`` (built in); a folder with a model, its tokenizer and, for CLIP, its image processor; a .gguf
            file; ``"package:NAME"`` for the one in an installed package, which is not imported; or a hub id such as "org/name".

    Raises:
        InputFileError: there is no such folder or file, or what is there cannot be loaded.
        HubError: the hub cannot be reached, does not have it, or does not give it without a licence accepted.
        ModelStructureError: its feed-forward sublayers cannot be found.
    """
    transformers_logging.disable_progress_bar()
    place, kind = seed_place(reference), seed_config(reference).model_type
    try:
        architecture = CLIPModel if kind == "clip" else AutoModelForCausalLM
        model = architecture.from_pretrained(place, dtype="auto").eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place, backend="pil") if kind == "clip" else None
    except (*HUB_FAILURES, SafetensorError) as error:
        raise _not_loaded(reference, error) from error
    ffn_paths(model)
    return Seed(reference, model, tokenizer, processor)


def seed_at(reference: str, place: Place) -> Seed:
    """A seed where it computes, once per process: its parameters on this device, in the dtype in which they are held.

    Single numbers, such as a temperature, are float32 always, and buffers, such as the frequencies of positions, stay as they
    are.

    Raises:
        InputFileError, HubError, ModelStructureError: as :func:`load_seed`.
    """
    stored = load_seed(reference)
    dtype = place.dtype_of(stored.dtype)
    if (stored.model.device, stored.dtype) == (place.device, dtype):
        return stored if place == stored.place else _elsewhere(stored, place, stored.model)
    return _elsewhere(stored, place, _held(stored, place.device, dtype))


@lru_cache(maxsize=4)
def _elsewhere(stored: Seed, place: Place, model: Any) -> Seed:
    return replace(stored, model=model, place=place, stored=stored)


# Two, for a process in which server and clients compute in different places.
@lru_cache(maxsize=2)
def _held(stored: Seed, device: torch.device, dtype: torch.dtype) -> Any:
    parameters = {
        id(p): torch.nn.Parameter(p.to(device, dtype if p.dim() else torch.float32), requires_grad=False)
        for p in stored.model.parameters()
    }
    buffers = {id(buffer): buffer.to(device) for buffer in stored.model.buffers()}
    return copy.deepcopy(stored.model, {**parameters, **buffers})


def seed_place(reference: str) -> str:
    """The folder or hub id of a seed, as :func:`load_seed` takes it; a .gguf file is read into a folder in the cache.

    Raises:
        InputFileError: there is no such folder or file.
    """
    if reference == "glyphs":
        return str(resources.files("metamoe.common") / "model" / "glyphs_seed")
    if reference.startswith("package:"):
        return str(from_gguf(packaged_gguf(reference.removeprefix("package:"))))
    if reference.endswith(".gguf"):
        return str(from_gguf(Path(reference)))
    local = Path(reference)
    if not (local / "config.json").is_file() and (local.exists() or reference.count("/") != 1):
        raise InputFileError(
            f"seed-model = {reference!r}: {local} holds no config.json; give glyphs, a model's folder, a .gguf file, "
            "package:NAME, or a hub id such as org/name"
        )
    return reference


def seed_config(reference: str) -> Any:
    """The config of a seed's model.

    Raises:
        InputFileError, HubError: as :func:`load_seed`.
    """
    place = seed_place(reference)
    try:
        return AutoConfig.from_pretrained(place)
    except HUB_FAILURES as error:
        raise _not_loaded(reference, error) from error


def _not_loaded(reference: str, error: Exception) -> InputFileError | HubError:
    place = seed_place(reference)
    if Path(place).exists():
        return InputFileError(f"seed-model = {reference!r}: {place} cannot be loaded: {error}")
    return hub_error("seed-model", reference, error)


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules over the *same* parameter tensors, so that a layer can be replaced without touching the seed."""
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)
