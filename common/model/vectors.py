"""Routing vectors: means of the FFN inputs, over a sample's real tokens and then over samples."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from metamoe.common import config
from metamoe.common.fisher import fisher_rows
from metamoe.common.model.inputs import Inputs, Tokens, embed, masked_mean
from metamoe.common.model.lora import expert_layers
from metamoe.common.model.seed import Seed


def evidence_paths(seed: Seed, lora: config.Lora, router: config.Router) -> list[list[str]]:
    """For each layer that decides, lowest first, the feed-forward sublayers at whose inputs its router looks.

    One layer decides, the lowest with experts, looking at its own input or at those of all layers up to it; or every layer with
    experts looks at its own. A decision on the embedding looks at none.
    """
    if router.decide == "embedding":
        return [[]]
    above = expert_layers(seed, lora)
    if router.decide == "per-layer":
        return [[path] for path in above]
    paths = seed.ffn_paths
    return [paths[: paths.index(above[0]) + 1] if router.evidence == "prefix" else above[:1]]


def all_evidence_paths(seed: Seed, lora: config.Lora, router: config.Router) -> list[str]:
    """The sublayers of :func:`evidence_paths` in one list: one for each routing vector of an expert, in their order."""
    return [path for paths in evidence_paths(seed, lora, router) for path in paths]


def evidence_width(seed: Seed, lora: config.Lora, router: config.Router) -> int:
    """How many features a decision looks at: E d of E sublayers' inputs, or d of the embedding."""
    return max(1, len(evidence_paths(seed, lora, router)[0])) * seed.width


def evidence_of(features: np.ndarray, router: config.Router) -> np.ndarray:
    """What decisions look at of the features [..., P + 1, d] of :func:`batch_features`: the sublayers' inputs [..., P, d], or
    the embedding [..., 1, d].
    """
    return features[..., -1:, :] if router.decide == "embedding" else features[..., :-1, :]


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
def batch_features(model: PreTrainedModel, paths: list[str], batch: Inputs) -> Tensor:
    """Every sample's mean FFN input in each of these layers, and last its embedding. Means are over all tokens of an image, and
    over those of a text's prompt. float32 [B, L + 1, d].
    """
    with ffn_inputs(model, paths) as captured:
        embedding = embed(model, batch)
        mask = batch.prompt.to(embedding.device) if isinstance(batch, Tokens) else None
        return torch.stack([*(masked_mean(captured[path], mask) for path in paths), embedding], dim=1).cpu()


def mean_over_samples(batches: Iterable[Tensor], weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over the first dimension of all batches together, whatever their sizes, accumulated in float64.

    Args:
        batches: [B, ...] each.
        weights: of the samples, [N], with sum one; None for equal ones.
    """
    total, count = None, 0
    for batch in batches:
        values = batch.double()
        if weights is not None:
            own = torch.from_numpy(weights[count : count + len(batch)])
            values = values * own.reshape(-1, *[1] * (batch.dim() - 1))
        total = values.sum(dim=0) if total is None else total + values.sum(dim=0)
        count += len(batch)
    if total is None:
        raise ValueError("the mean of no samples is not defined")
    return (total if weights is not None else total / count).numpy()


def routing_vectors(features: Iterable[Tensor], weights: np.ndarray | None = None) -> np.ndarray:
    """Routing vectors of an expert (Jiang et al. 2026, Eq. 7 and 8).

    e^(l) = the mean over samples of the mean over tokens of z^(l), the input of layer l's feed-forward sublayer in the expert.
    Given the private samples together with the proxies this is N/(N+m) mu_priv + m/(N+m) mu_proxy.

    Args:
        features: :func:`batch_features` of all samples in the expert, [B, L + 1, d] each, in any split.
        weights: of the samples, [N], with sum one; None for equal ones.

    Returns:
        float64 [L, d].
    """
    return mean_over_samples((batch[:, :-1] for batch in features), weights)


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
