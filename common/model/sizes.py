"""How large a run will be, from the seed's config alone: nothing is loaded, as the model is laid out on torch's meta device."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPModel

from metamoe.common.config import Settings
from metamoe.common.model.batch import packed
from metamoe.common.model.inputs import Inputs, Tokens, encode
from metamoe.common.model.lora import expert_shapes, with_lora
from metamoe.common.model.seed import Seed, seed_config
from metamoe.common.wire import MESSAGE_TYPE, reply_artifacts, request_artifacts

_ADAM = 4
"""Numbers for each that is trained: itself, its gradient, and the two moments of AdamW."""
_FLOAT = 4


@dataclass(frozen=True)
class Sizes:
    """What a run takes, in bytes but for the two counts.

    Attributes:
        parameters: of the seed.
        expert_parameters: of one expert.
        weights: the seed in memory, once for each process.
        up, down: arrays that a client sends and receives, in all three stages.
        training: memory of a client while it trains: the seed, the expert with its gradient and moments, and what one batch
            keeps for the backward pass.
    """

    parameters: int
    expert_parameters: int
    weights: int
    up: int
    down: int
    training: int


def predicted_sizes(settings: Settings) -> Sizes:
    """The sizes of a run with these settings.

    Raises:
        InputFileError, HubError: the seed's config cannot be had.
        ModelStructureError: its feed-forward sublayers cannot be found.
    """
    seed = meta_seed(settings.seed_model)
    parameters = sum(parameter.numel() for parameter in seed.model.parameters())
    expert = sum(out * into for out, into in expert_shapes(seed, settings.lora).values())
    up = sum(artifact.bytes for kind in MESSAGE_TYPE for artifact in reply_artifacts(kind, settings, seed))
    down = sum(artifact.bytes for kind in MESSAGE_TYPE for artifact in request_artifacts(kind, settings, seed))
    kept = kept_for_backward(seed, settings)
    return Sizes(parameters, expert, parameters * _FLOAT, up, down, parameters * _FLOAT + expert * _ADAM * _FLOAT + kept)


def meta_seed(reference: str) -> Seed:
    """A seed without weights and tokenizer, laid out by its config."""
    config = seed_config(reference)
    build = CLIPModel if config.model_type == "clip" else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config)
    return Seed(reference, model.eval().requires_grad_(False), None, None)


def kept_for_backward(seed: Seed, settings: Settings) -> int:
    """Bytes that one training step of an expert keeps for its backward pass, counted on the meta device.

    Each storage is counted once, and weights not at all. Text is as long as the settings allow.
    """
    model = with_lora(seed, settings.lora)
    owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in owned:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encode(model, _longest_batch(seed, settings)).sum()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def _longest_batch(seed: Seed, settings: Settings) -> Inputs:
    count = settings.expert_training.batch_size
    if seed.is_image_model:
        vision = seed.model.config.vision_config
        return torch.empty(count, vision.num_channels, vision.image_size, vision.image_size, device="meta")
    data = settings.data
    tokens, _ = packed([([0] * data.prompt_tokens, [[0] * (data.answer_tokens + 1)])] * count)
    return Tokens(*(getattr(tokens, name).to("meta") for name in ("ids", "positions", "visible", "prompt")))
