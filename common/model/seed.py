"""The frozen seed model M0: loading, fingerprint, feed-forward sublayers, embedding."""

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
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging

from common.errors import InputFileError, ModelStructureError

_TOWER = ("hidden_act", "num_attention_heads", "layer_norm_eps", "patch_size", "image_size")
_PROCESSOR = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)


@dataclass(frozen=True)
class Seed:
    """A frozen seed model with what turns names and images into its inputs. Shared within a process: never modified."""

    reference: str
    model: CLIPModel
    tokenizer: Any
    processor: Any

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides the seed's output: every parameter's name, dtype, shape and bytes, the settings of both
        towers and of the image processor, and the tokenizer's words.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        # By name: the files hold much else, such as versions and paths, that may differ between places.
        towers = (self.model.config.vision_config, self.model.config.text_config)
        for part, names in ((towers[0], _TOWER), (towers[1], _TOWER), (self.processor, _PROCESSOR)):
            digest.update(repr([(name, _plain(getattr(part, name, None))) for name in names]).encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()

    @property
    def ffn_paths(self) -> list[str]:
        return ffn_paths(self.model)

    @property
    def width(self) -> int:
        """d, the width of the residual stream and of every routing vector."""
        return self.model.vision_model.config.hidden_size


def _plain(value: Any) -> Any:
    """A setting in a form whose text is the same everywhere."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return sorted((key, entry) for key, entry in value.items() if entry is not None)
    return list(value) if isinstance(value, (list, tuple)) else value


@lru_cache(maxsize=1)
def load_seed(reference: str) -> Seed:
    """Load a seed once per process: ``"glyphs"`` (built in) or a folder with a CLIP model, tokenizer and image processor.

    Raises:
        InputFileError: the folder holds no CLIP model.
        ModelStructureError: its feed-forward sublayers cannot be found.
    """
    packaged = resources.files("common") / "model" / "glyphs_seed"
    folder = Path(str(packaged)) if reference == "glyphs" else Path(reference)
    if not (folder / "config.json").is_file():
        raise InputFileError(f'seed-model = {reference!r}: {folder} holds no config.json; give "glyphs" or a model\'s folder')
    transformers_logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "clip":
            raise InputFileError(f"seed-model = {reference!r} is a {kind!r} model; supported are: clip")
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputFileError(f"seed-model = {reference!r}: {folder} cannot be loaded: {error}") from error
    ffn_paths(model)
    return Seed(reference, model, tokenizer, processor)


def ffn_paths(model: nn.Module) -> list[str]:
    """Module paths of the vision tower's feed-forward sublayers, lowest layer first, found by their structure.

    A feed-forward sublayer is a module with linear ``fc1`` [d -> h] and ``fc2`` [h -> d].

    Raises:
        ModelStructureError: there is none; names what was found.
    """
    tower = getattr(model, "vision_model", None)
    modules = list(tower.named_modules(prefix="vision_model")) if tower is not None else []
    paths = [path for path, module in modules if _is_ffn(module)]
    if not paths:
        kinds = sorted({type(module).__name__ for _, module in modules}) or [type(model).__name__]
        raise ModelStructureError(
            f"no feed-forward sublayer with linear fc1 and fc2 in the vision tower; found {', '.join(kinds)}"
        )
    return paths


def _is_ffn(module: nn.Module) -> bool:
    up, down = getattr(module, "fc1", None), getattr(module, "fc2", None)
    if not (isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return False
    return up.in_features == down.out_features and up.out_features == down.in_features


def share(model: CLIPModel) -> CLIPModel:
    """A copy of the modules over the *same* parameter tensors, so that a layer can be replaced without touching the seed."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def embed(model: CLIPModel, pixel_values: Tensor) -> Tensor:
    """M0's embedding z: the vision tower's pooled output after the final layer norm. float32 [B, d]."""
    return model.vision_model(pixel_values=pixel_values).pooler_output
