"""Routing vectors: means of the FFN inputs, over a sample's real tokens and then over samples."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from common.fisher import fisher_rows


def masked_mean(z: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of a sequence that are not padding.

    Args:
        z: [B, T, d].
        mask: bool [B, T], true for real tokens; None if all are.

    Returns:
        [B, d]; zero for a sequence of padding only.
    """
    if mask is None:
        return z.mean(dim=1)
    weights = mask.to(z.dtype).unsqueeze(-1)
    return (z * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


@contextmanager
def ffn_inputs(model: nn.Module, paths: list[str]) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass of ``model`` leaves the inputs z [B, T, d] of these sublayers in the dict it yields."""
    captured: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: captured.update({path: args[0]}))
        for path in paths
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def mean_ffn_inputs(model: CLIPModel, paths: list[str], batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """For each batch of pixel values, every sample's mean FFN input in each of these layers. float32 [B, L, d]."""
    with ffn_inputs(model, paths) as captured:
        for batch in batches:
            model.vision_model(pixel_values=batch)
            yield torch.stack([masked_mean(captured[path]) for path in paths], dim=1)


def mean_over_samples(batches: Iterable[Tensor]) -> np.ndarray:
    """Mean over the first dimension of all batches together, whatever their sizes, accumulated in float64."""
    total, count = None, 0
    for batch in batches:
        part = batch.double().sum(dim=0)
        total = part if total is None else total + part
        count += len(batch)
    if total is None:
        raise ValueError("the mean of no samples is not defined")
    return (total / count).numpy()


def routing_vectors(model: CLIPModel, paths: list[str], batches: Iterable[Tensor]) -> np.ndarray:
    """Routing vectors of an expert (Jiang et al. 2026, Eq. 7 and 8).

    e^(l) = the mean over samples of the mean over tokens of z^(l), the input of layer l's feed-forward sublayer in the expert.
    Given the private samples together with the proxies this is N/(N+m) mu_priv + m/(N+m) mu_proxy.

    Args:
        model: the expert.
        paths: its feed-forward sublayers.
        batches: pixel values of all samples, in any split.

    Returns:
        float64 [L, d].
    """
    return mean_over_samples(mean_ffn_inputs(model, paths, batches))


def router_rows(vectors: np.ndarray, covariance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """A layer's initial router from the experts' routing vectors.

    Args:
        vectors: [K, d].
        covariance: S_0 [d, d] of the same feature on public data for Fisher rows; None for plain dot products (the paper).

    Returns:
        Rows [K, d] and biases [K].
    """
    if covariance is None:
        return np.asarray(vectors, dtype=np.float64), np.zeros(len(vectors))
    return fisher_rows(vectors, covariance)
