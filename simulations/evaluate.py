"""Using a seed, experts or a unified model on test images: scores, accuracy, routing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from metamoe.common import config
from metamoe.common.compute import Place
from metamoe.common.config import Settings
from metamoe.common.data.datasets import evaluation_sets, held_out_public
from metamoe.common.data.metrics import Answered, answered
from metamoe.common.data.tasks import Samples, class_names, samples_of
from metamoe.common.model.batch import Batch, Scores
from metamoe.common.model.inputs import Inputs, Tokens, encode, masked_mean
from metamoe.common.model.lora import Expert
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.seed import seed_at

PUBLIC = "public"


@dataclass(frozen=True)
class EvaluationSet:
    """Samples ready to be scored: ``domain`` is where they come from, or ``"public"``."""

    name: str
    domain: str
    samples: Samples


@lru_cache(maxsize=1)
def test_sets(seed_model: str, place: Place, data: config.Data) -> list[EvaluationSet]:
    """Every test set of a run, and last the held-out public samples.

    Each image is named among its own domain's classes, the public ones among all public classes; of each question one of its
    choices is right, of a held-out instruction its own output among three others.
    """
    seed = seed_at(seed_model, place)
    sets: dict[str, Dataset] = {**evaluation_sets(data), PUBLIC: held_out_public(data)}
    tests = []
    for name, samples in sets.items():
        ready = samples_of(seed, data, [samples], class_names(samples))
        tests.append(EvaluationSet(name, name.partition(",")[0], ready))
    return tests


@torch.inference_mode()
def answers_and_routing(model: UnifiedModel, samples: Samples) -> tuple[Answered, list[list[float]]]:
    """What a unified model says to samples and, from the same pass, the share of all tokens, of text those of prompts, whose
    most likely expert is each of the K, for each layer that decides. [G][K].
    """
    counts: list[Tensor] = []

    def scores(batch: Batch) -> Tensor:
        found, decisions = model.answers(batch.inputs, partial(batch.scores, model.backbone))
        # Last: a batch that does not fit is tried again in parts, and counts once.
        counts.append(torch.stack([_most_likely(decision, batch.inputs) for decision in decisions]))
        return found

    told = answered(scores, samples)
    total = torch.stack(counts).sum(0).cpu()
    shares = total / total.sum(dim=1, keepdim=True)
    return told, [[round(share, 4) for share in row] for row in shares.tolist()]


def _most_likely(decision: Tensor, inputs: Inputs) -> Tensor:
    """Of how many tokens, of text those of prompts, each expert is the most likely by log pi [B, T, K]. int64 [K]."""
    best = decision.argmax(-1, keepdim=True) == torch.arange(decision.shape[-1], device=decision.device)
    if not isinstance(inputs, Tokens):
        return best.sum(dim=(0, 1))
    mask = inputs.prompt.to(decision.device).unsqueeze(-1)
    return (best & mask).sum(dim=(0, 1))


def dense(model: PreTrainedModel) -> Scores:
    """The scores of a seed or of an expert."""
    return lambda batch: batch.scores(model, encode(model, batch.inputs))


def ensemble(members: Sequence[Scores]) -> Scores:
    """Branch-Train-Merge: the mean of the members' probabilities, (1/K) sum_k softmax(s_k)."""
    return lambda batch: torch.stack([member(batch).softmax(1) for member in members]).mean(0)


def mean_decision(decision: Tensor, inputs: Inputs) -> Tensor:
    """pi of whole samples: the mean over an image's tokens, or those of a prompt, of what one layer decided, log pi [B, T, K].
    float32 [B, K].
    """
    mask = inputs.prompt if isinstance(inputs, Tokens) and decision.shape[1] > 1 else None
    return masked_mean(decision.exp(), mask).float().cpu()


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


def domains_of(settings: Settings, expert: str, merged: Mapping[str, Sequence[str]]) -> set[str]:
    """The domains that an expert of the unified model has seen: its client's, those of all clients whose experts were merged
    into it, or none for the seed.
    """
    by_client = {name: settings.client_domain(client) for client, name in enumerate(settings.client_names)}
    return {by_client[name] for name in merged.get(expert, [expert]) if name in by_client}


def own_share(owners: Sequence[set[str]], test: EvaluationSet, shares: list[list[float]]) -> float:
    """Share of a test set's tokens that reach an expert of their own domain, mean over the layers that decide.

    Args:
        owners: the domains of each expert, in the order of the shares.
        test: the test set.
        shares: see :func:`answers_and_routing`.
    """
    return sum(row[k] for row in shares for k, domains in enumerate(owners) if test.domain in domains) / len(shares)
