"""How good scores are, by what a field asks for beside accuracy."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from metamoe.common.batching import Fitting
from metamoe.common.data.tasks import Samples
from metamoe.common.metrics import Metrics
from metamoe.common.model.batch import Scores

_BINS = 15


@dataclass(frozen=True)
class Answered:
    """What a model said to N samples.

    Attributes:
        chosen: int64 [N], the best class or choice.
        confidence: float32 [N], its probability, the softmax of the scores.
        likelihood: float32 [N], the log-likelihood of the right one; of text the mean over its tokens.
    """

    chosen: Tensor
    confidence: Tensor
    likelihood: Tensor


@torch.inference_mode()
def answered(scores: Scores, samples: Samples) -> Answered:
    """What scores say to every sample."""
    text = samples.answer_tokens is not None
    fitting = Fitting(samples.cost)
    pairs = [
        pair
        for rows in samples.batches()
        for pair in fitting(lambda some: said(scores(samples.asked(some)), samples.answers[some], text), rows)
    ]
    order = torch.cat([rows for rows, _ in pairs]).argsort()
    # Once for all: until here nobody waits for the device.
    names = ("chosen", "confidence", "likelihood")
    return Answered(*(torch.cat([getattr(part, name) for _, part in pairs]).cpu()[order] for name in names))


def said(scores: Tensor, answers: Tensor, text: bool) -> Answered:
    """The same of scores [B, C], for the right answers [B] on the scores' device; of text, they are log-likelihoods."""
    found = scores.float()
    best = found.softmax(1).max(1)
    logs = found if text else found.log_softmax(1)
    return Answered(found.argmax(1), best.values, logs.gather(1, answers.to(found.device)[:, None]).squeeze(1))


def accuracy(scores: Scores, samples: Samples) -> float:
    """Share of samples whose best class or choice is the right one, in percent."""
    return 100.0 * int(answered(scores, samples).chosen.eq(samples.answers).sum()) / len(samples.answers)


def metrics_of(found: Answered, samples: Samples) -> Metrics:
    """All metrics of what a model said to samples."""
    # Libraries that take their time to load.
    from sklearn.metrics import balanced_accuracy_score, f1_score
    from torchmetrics.functional.classification import binary_calibration_error

    right = found.chosen.eq(samples.answers)
    count, hits = len(right), int(right.sum())
    lengths = samples.answer_tokens
    macro_f1 = balanced = perplexity = None
    if lengths is None:
        truth, chosen = samples.answers.numpy(), found.chosen.numpy()
        macro_f1 = round(100 * float(f1_score(truth, chosen, average="macro", zero_division=0)), 2)
        with warnings.catch_warnings(action="ignore"):
            # Of classes that are named and never there.
            balanced = round(100 * float(balanced_accuracy_score(truth, chosen)), 2)
    else:
        loss = -(found.likelihood.double() * lengths).sum() / lengths.sum()
        perplexity = round(math.exp(min(loss.item(), 700.0)), 4)
    error = binary_calibration_error(found.confidence, right.long(), n_bins=_BINS)
    low, high = interval(hits, count)
    return Metrics(
        accuracy=round(100.0 * hits / count, 2),
        interval=(round(low, 2), round(high, 2)),
        count=count,
        macro_f1=macro_f1,
        balanced_accuracy=balanced,
        calibration_error=round(100 * float(error), 2),
        perplexity=perplexity,
    )


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share of ``right`` in ``count`` (Wilson 1927), in percent."""
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(method="wilson")
    return 100 * float(found.low), 100 * float(found.high)
