"""How large a run will be, from the seed's config alone: nothing is loaded, as the model is laid out on torch's meta device."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, CLIPModel

from metamoe.common.compute import Place, precision_of
from metamoe.common.config import Settings
from metamoe.common.model.batch import Targets, class_logits, packed
from metamoe.common.model.inputs import Inputs, encode
from metamoe.common.model.lora import expert_shapes, with_lora
from metamoe.common.model.seed import Seed, seed_config
from metamoe.common.wire import MESSAGE_TYPE, reply_artifacts, request_artifacts

_FLOAT = 4
_MOMENTS = {"adamw": 2, "sgd": 1}
"""Numbers that an optimizer keeps for each that is trained."""
_CLASSES = 1_000
"""Told apart in training, as far as anybody can say who has not loaded the data."""


@dataclass(frozen=True)
class Sizes:
    """What a run takes, in bytes but for the two counts.

    Attributes:
        parameters: of the seed.
        expert_parameters: of one expert.
        weights: the seed in memory, once for each process.
        up, down: arrays that a client sends and receives, in all three stages.
        training: memory of a client while it trains, at its peak: the seed, the expert with its gradient and moments, and what
            one part of a batch takes on its way forward and back.
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
    seed = meta_seed(settings.seed_model, held_in(settings))
    parameters = list(seed.model.parameters())
    count, weights = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    expert = sum(out * into for out, into in expert_shapes(seed, settings.lora).values())
    up = sum(artifact.bytes for kind in MESSAGE_TYPE for artifact in reply_artifacts(kind, settings, seed))
    down = sum(artifact.bytes for kind in MESSAGE_TYPE for artifact in request_artifacts(kind, settings, seed))
    moments = _MOMENTS[settings.expert_training.optimizer] * expert * _FLOAT
    return Sizes(count, expert, weights, up, down, weights + expert * _FLOAT + moments + step_bytes(seed, settings))


def held_in(settings: Settings) -> torch.dtype:
    """The dtype in which a client holds the seed, by its config."""
    stored = seed_config(settings.seed_model).dtype or torch.float32
    # Not the device itself, which need not be here.
    gpu = settings.compute.client_device.startswith("cuda") or (
        settings.compute.client_device == "auto" and torch.cuda.is_available()
    )
    place = Place(torch.device("cuda" if gpu else "cpu"), settings.compute.precision, settings.compute.weights)
    return place.dtype_of(stored)


def meta_seed(reference: str, dtype: torch.dtype = torch.float32) -> Seed:
    """A seed without weights and tokenizer, laid out by its config."""
    config = seed_config(reference)
    build = CLIPModel if config.model_type == "clip" else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config)
    return Seed(reference, nn.Module.to(model, dtype).eval().requires_grad_(False), None, None)


def step_bytes(seed: Seed, settings: Settings) -> int:
    """Bytes that one part of a training step of an expert takes at its peak, gradients with it and weights without: counted on
    tensors that have a size and no numbers. Text is as long as the settings allow.
    """
    model = with_lora(seed, settings.lora)
    inputs, targets = _longest_batch(seed, settings)
    with FakeTensorMode(allow_non_fake_inputs=True), precision_of(settings.compute.precision, torch.device("cpu")):
        _give_sizes(model)
        owned = [*model.parameters(), *model.buffers()]
        with _Alive(owned) as alive:
            encoded = encode(model, inputs)
            if isinstance(targets, Targets):
                logits = model.lm_head(encoded[targets.sample, targets.position]).float()
                wanted = targets.token
            else:
                logits = class_logits(model, encoded, targets)
                wanted = torch.zeros(len(encoded), dtype=torch.long)
            torch.nn.functional.cross_entropy(logits, wanted).backward()
    return alive.most


def _longest_batch(seed: Seed, settings: Settings) -> tuple[Inputs, Targets | Tensor]:
    """What one part of a batch is at its largest, and what is to be said of it: tokens, or the classes' text features."""
    count = settings.expert_training.batch_size
    count = min(settings.compute.micro_batch_size or count, count)
    if seed.is_image_model:
        vision = seed.model.config.vision_config
        images = torch.empty(count, vision.num_channels, vision.image_size, vision.image_size)
        return images, torch.empty(_CLASSES, seed.model.config.projection_dim)
    data = settings.data
    return packed([([0] * data.prompt_tokens, [[0] * (data.answer_tokens + 1)])] * count)


def _give_sizes(model: nn.Module) -> None:
    """Put tensors of the present mode, on a CPU, in the place of a model's, which lie on the meta device."""
    # By the tensor, as a module can have one of another module.
    parameters = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad) for p in model.parameters()}
    buffers = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    for module in model.modules():
        module._parameters.update({n: parameters[id(p)] for n, p in module._parameters.items() if p is not None})
        module._buffers.update({n: buffers[id(b)] for n, b in module._buffers.items() if b is not None})


class _Alive(TorchDispatchMode):
    """While open, counts the bytes of all that is made and still there: ``most`` is the largest number there was."""

    def __init__(self, owned: Iterable[Tensor]) -> None:
        super().__init__()
        self._now = self.most = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in owned)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            weakref.finalize(storage, self._gone, storage.nbytes())
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)

    def _gone(self, size: int) -> None:
        self._now -= size
