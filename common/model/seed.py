"""The frozen seed model M0: loading, fingerprint, feed-forward sublayers."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
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

    ``model`` is a CLIP model, or a decoder for text, which has no ``processor``.
    """

    reference: str
    model: Any
    tokenizer: Any
    processor: Any

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the seed's output: every parameter's name, dtype, shape and bytes, the settings of the
        model's layers and of the image processor, and the tokenizer's words.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
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
    """Load a seed once per process.

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
        model = architecture.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(place)
        processor = AutoImageProcessor.from_pretrained(place, backend="pil") if kind == "clip" else None
    except (*HUB_FAILURES, SafetensorError) as error:
        raise _not_loaded(reference, error) from error
    ffn_paths(model)
    return Seed(reference, model, tokenizer, processor)


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
