"""Experts: LoRA on the feed-forward sublayers of the seed, trained with PEFT and stored in its format."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from metamoe.common.config import Lora
from metamoe.common.errors import InvalidSettingError
from metamoe.common.model.seed import Seed, share

if TYPE_CHECKING:
    from peft import LoraConfig

Expert = dict[str, Tensor]
"""The LoRA matrices of one expert, by name: ``<FFN path>.<linear map>.lora_<A|B>.weight``, A [r, in], B [out, r]."""

_PEFT_PREFIX = "base_model.model."


def expert_layers(seed: Seed, lora: Lora) -> list[str]:
    """Paths of the feed-forward sublayers that have experts.

    Raises:
        InvalidSettingError: ``lora.first-layer`` is beyond the last layer.
    """
    paths = seed.ffn_paths
    if lora.first_layer >= len(paths):
        raise InvalidSettingError(f"lora.first-layer = {lora.first_layer}, but the seed has layers 0 to {len(paths) - 1}")
    return paths[lora.first_layer :]


def expert_shapes(seed: Seed, lora: Lora) -> dict[str, tuple[int, int]]:
    """Name and shape of every LoRA matrix of an expert: all that may arrive as one."""
    shapes = {}
    for path in expert_layers(seed, lora):
        for linear in seed.form.linears:
            out_features, in_features = seed.model.get_parameter(f"{path}.{linear}.weight").shape
            shapes[f"{path}.{linear}.lora_A.weight"] = (lora.rank, in_features)
            shapes[f"{path}.{linear}.lora_B.weight"] = (out_features, lora.rank)
    return shapes


def peft_config(seed: Seed, lora: Lora) -> "LoraConfig":
    """The adapter as PEFT describes it."""
    # Here and below not before it is needed: who asks a model, or only counts its arrays, needs no PEFT.
    from peft import LoraConfig

    paths = "|".join(re.escape(path) for path in expert_layers(seed, lora))
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=rf"({paths})\.({'|'.join(seed.form.linears)})",
        base_model_name_or_path=seed.reference,
    )


def with_lora(seed: Seed, lora: Lora, expert: Expert | None = None) -> PreTrainedModel:
    """The seed with one adapter: a new one (B = 0, trainable) or, if given, an expert. Base weights are shared, not copied."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    model = share(seed.model)
    inject_adapter_in_model(peft_config(seed, lora), model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # PEFT makes an adapter as its base is. What is trained stays float32, and is cast where it is multiplied, by
            # autocast; so its input need not be cast first.
            module.cast_input_dtype_enabled = False
            for matrices in (module.lora_A, module.lora_B):
                matrices.float()
    if expert is not None:
        set_peft_model_state_dict(model, {name: tensor.float() for name, tensor in expert.items()})
    return model


def expert_of(model: PreTrainedModel) -> Expert:
    """The adapter of a model made by :func:`with_lora`, detached and copied."""
    from peft import get_peft_model_state_dict

    return {
        name: tensor.detach().cpu().clone()
        for name, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items())
    }


def save_adapter(folder: Path, seed: Seed, lora: Lora, expert: Expert) -> None:
    """Write an expert so that ``PeftModel.from_pretrained(seed, folder)`` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = peft_config(seed, lora)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    weights = {_PEFT_PREFIX + name: tensor.contiguous() for name, tensor in expert.items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def load_adapter(folder: Path) -> Expert:
    """Read what :func:`save_adapter` wrote."""
    weights = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in weights.items()}


def rounded(expert: Expert) -> Expert:
    """The expert as it crosses the wire: float16."""
    return {name: tensor.to(torch.float16) for name, tensor in expert.items()}
