"""What a seed takes, images or text, and the way through it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel, DynamicCache, PreTrainedModel

from metamoe.common.compute import moved


@dataclass(frozen=True)
class Tokens:
    """Text as a decoder takes it.

    Attributes:
        ids: int64 [B, T].
        positions: int64 [B, T], of each token in its text.
        visible: bool [B, T, S], the tokens that each token sees, S of them: those kept from earlier calls, and these T.
        prompt: bool [B, T], true for tokens of the prompt, over which routing vectors are means, and on which routing that is
            decided once is decided. Padding is never among them.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    prompt: Tensor

    def to(self, device: torch.device | str) -> "Tokens":
        return Tokens(*(moved(tensor, device) for tensor in (self.ids, self.positions, self.visible, self.prompt)))


Inputs = Tensor | Tokens
"""Pixel values, float32 [B, 3, H, W], or text."""


def prompt_tokens(ids: Tensor, real: Tensor) -> Tokens:
    """Prompts that are padded on either side, each token seeing those before it.

    Args:
        ids: int64 [B, T].
        real: bool [B, T], false for padding.
    """
    length = ids.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    # Padding sees itself, so that it has something to look at; nobody looks at it.
    visible = (before & real[:, None]) | torch.eye(length, dtype=torch.bool, device=ids.device)
    return Tokens(ids, (real.cumsum(1) - 1).clamp(min=0), visible, real)


def encode(model: Any, inputs: Inputs, past: DynamicCache | None = None) -> Tensor:
    """The last hidden states after the final norm: pooled for images [B, d], of every token for text [B, T, d].

    Args:
        model: a seed, or one with experts in its place.
        inputs: what to encode.
        past: keys and values of earlier calls, to which these are added; for text.
    """
    if isinstance(inputs, Tensor):
        return model.vision_model(pixel_values=moved(inputs, model.device)).pooler_output
    inputs = inputs.to(model.device)
    return model.model(
        input_ids=inputs.ids,
        attention_mask=_attention_masks(model, inputs.visible),
        position_ids=inputs.positions,
        past_key_values=past,
        use_cache=past is not None,
    ).last_hidden_state


def _attention_masks(model: Any, visible: Tensor) -> Tensor | dict[str, Tensor]:
    """What is added to attention scores [B, 1, T, S]; of a decoder whose layers differ, by their type."""

    def added(seen: Tensor) -> Tensor:
        zeros = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
        return zeros.masked_fill(~seen, torch.finfo(model.dtype).min).unsqueeze(1)

    window = getattr(model.config, "sliding_window", None)
    if window is None or visible.shape[-1] <= window:
        return added(visible)
    # The tokens that one sees are those of its text, in order: the window is the last of them.
    recent = added(visible & (visible.flip(-1).cumsum(-1).flip(-1) <= window))
    if getattr(model.config, "layer_types", None) is None:
        return recent
    return {"full_attention": added(visible), "sliding_attention": recent}


def embed(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """M0's embedding z: the vision tower's pooled output, or the mean over the prompt's tokens of a decoder's last hidden
    state. float32 [B, d].
    """
    return pooled(encode(model, inputs), inputs)


def pooled(encoded: Tensor, inputs: Inputs) -> Tensor:
    """One vector for each sample out of what :func:`encode` gave. float32 [B, d]."""
    return encoded.float() if isinstance(inputs, Tensor) else masked_mean(encoded, inputs.prompt.to(encoded.device))


def masked_mean(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of a sequence that are not padding, summed in float32 whatever the tokens are in.

    Args:
        z: [B, T, d].
        mask: bool [B, T], true for real tokens; None if all are.

    Returns:
        [B, d]; zero for a sequence of padding only.
    """
    if mask is None:
        return z.mean(dim=1, dtype=torch.float32)
    weights = mask.to(z).unsqueeze(-1)
    return (z * weights).sum(dim=1, dtype=torch.float32) / weights.sum(dim=1, dtype=torch.float32).clamp(min=1)


def is_image_model(model: PreTrainedModel) -> bool:
    return isinstance(model, CLIPModel)
