"""Using a seed, experts or a unified model on test images: scores, accuracy, routing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from datasets import Dataset
from torch import Tensor
from transformers import CLIPModel

from common import config
from common.config import Settings
from common.data.datasets import evaluation_sets, held_out_public
from common.data.tasks import all_pixels, class_logits, class_names, labels_in, text_features
from common.model.lora import Expert
from common.model.moe import UnifiedModel
from common.model.seed import embed, load_seed

PUBLIC = "public"
_BATCH = 256

Scores = Callable[[Tensor, Tensor], Tensor]
"""Class scores [B, C] of pixel values [B, 3, H, W] and unit text features [C, p]."""


@dataclass(frozen=True)
class ImageSet:
    """Images ready to be scored: ``domain`` is where they come from, or ``"public"``."""

    name: str
    domain: str
    pixels: Tensor
    labels: Tensor
    texts: Tensor


@lru_cache(maxsize=1)
def image_sets(seed_model: str, data: config.Data) -> list[ImageSet]:
    """Every test set of a run, and last the held-out public samples.

    Each image is named among its own domain's classes, the public ones among all public classes.
    """
    seed = load_seed(seed_model)
    sets: dict[str, Dataset] = {**evaluation_sets(data), PUBLIC: held_out_public(data)}
    tests = []
    for name, samples in sets.items():
        names = class_names(samples)
        texts = text_features(seed, names, data.prompt)
        tests.append(ImageSet(name, name.partition(",")[0], all_pixels(seed, samples), labels_in(samples, names), texts))
    return tests


@torch.inference_mode()
def percent_right(scores: Scores, test: ImageSet) -> float:
    """Share of a test set's images whose best class is the right one, %."""
    best = torch.cat([scores(batch, test.texts).argmax(1) for batch in test.pixels.split(_BATCH)])
    return 100.0 * best.eq(test.labels).float().mean().item()


@torch.inference_mode()
def routing_shares(model: UnifiedModel, pixels: Tensor) -> list[list[float]]:
    """Share of all tokens whose most likely expert is each of the K, for each layer that decides. [G][K]."""
    counts: Tensor | None = None
    for batch in pixels.split(_BATCH):
        _, decisions = model(batch)
        chosen = torch.stack([torch.bincount(d.argmax(-1).flatten(), minlength=d.shape[-1]) for d in decisions])
        counts = chosen if counts is None else counts + chosen
    if counts is None:
        return []
    return [[round(share, 4) for share in row] for row in (counts / counts.sum(dim=1, keepdim=True)).tolist()]


def dense(model: CLIPModel) -> Scores:
    """The scores of a seed or of an expert."""
    return lambda pixels, texts: class_logits(model, embed(model, pixels), texts)


def ensemble(members: Sequence[Scores]) -> Scores:
    """Branch-Train-Merge: the mean of the members' probabilities, (1/K) sum_k softmax(s_k)."""
    return lambda pixels, texts: torch.stack([member(pixels, texts).softmax(1) for member in members]).mean(0)


def soup(experts: Sequence[Expert], lora: config.Lora) -> tuple[Expert, config.Lora]:
    """Model Soup: the dense model whose weights are the experts' mean, W + (1/K) sum_k (alpha / r) B_k A_k.

    Exact as one adapter of K times the rank, with A stacked and B side by side, divided by K.
    """
    count = len(experts)
    merged = {
        name: torch.cat([expert[name].float() for expert in experts], dim=0)
        if ".lora_A." in name
        else torch.cat([expert[name].float() / count for expert in experts], dim=1)
        for name in experts[0]
    }
    return merged, lora.model_copy(update={"rank": count * lora.rank, "alpha": count * lora.alpha})


def own_share(settings: Settings, test: ImageSet, shares: list[list[float]]) -> float:
    """Share of a test set's tokens that reach an expert of their own domain, mean over the layers that decide."""
    own = [k for k in range(settings.clients) if settings.client_domain(k) == test.domain]
    return sum(row[k] for row in shares for k in own) / len(shares)
