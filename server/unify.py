"""Stage 3: assemble one Mixture-of-Experts and train its router on the proxies."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy.special import logsumexp
from torch import Tensor

from metamoe.common.checkpoint import Checkpoint
from metamoe.common.compute import derived_seed, optimizer_of
from metamoe.common.config import Settings
from metamoe.common.curve import Curve, Progress
from metamoe.common.data.datasets import label_space
from metamoe.common.data.tasks import Parts, class_names, features, samples_of
from metamoe.common.fisher import shrunk_covariance
from metamoe.common.gaussian import Gaussians, Shape, public_coordinates
from metamoe.common.model.artifact import UnifiedWeights
from metamoe.common.model.batch import Batch
from metamoe.common.model.inputs import Tokens
from metamoe.common.model.lora import Expert, rounded, with_lora
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import Quadratic, RouterWeights
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import all_evidence_paths, evidence_paths, evidence_width, router_rows, routing_vectors
from metamoe.server.relevance import tempered_weights
from metamoe.server.shapes import client_gaussians

_STAGE = 3
_COVARIANCE_SAMPLES = 4_000
_FRESH_SCALE = 0.02
# Of the seed against an expert: where rows are linear, and the share of public samples that stay with it where they are not.
FISHER_ODDS, _KEPT = -8.0, 0.98
# Of each client's own Gaussian, the share that the seed may get at most, and how many samples tell it.
_LOST, _DRAWN = 0.2, 1_000
# Of the proxies, in means that are weighted by relevance.
_EFFECTIVE_SHARE = 0.5


def initial_routers(
    seed: Seed,
    settings: Settings,
    public: np.ndarray,
    proxies: Sequence[Dataset],
    scores: Sequence[np.ndarray],
    experts: Sequence[Expert],
    vectors: Sequence[np.ndarray | None],
    shapes: Sequence[Shape | None] = (),
) -> list[RouterWeights]:
    """Routers as they start, one for each layer that decides.

    Args:
        seed, settings: the run's.
        public: what decisions look at, of the public samples in the seed, [n, P, d]: its covariance makes Fisher rows, its mean
            is the seed's own routing vector. Without either, it is not looked at.
        proxies: each client's.
        scores: their log-odds, [m] each.
        experts: each client's.
        vectors: each client's routing vectors [P, d]; without them, the means over its proxies in its expert are taken.
        shapes: each client's, where these are asked for.
    """
    router = settings.router
    if settings.by_shape:
        return [_gaussian_router(settings, public, np.stack([v for v in vectors if v is not None]), shapes)]
    rng = np.random.default_rng(derived_seed(settings.seed, _STAGE, 0))
    groups = evidence_paths(seed, settings.lora, router)
    count, width = len(experts) + router.seed_expert, evidence_width(seed, settings.lora, router)
    if router.rows == "fresh":
        random = [rng.normal(scale=_FRESH_SCALE, size=(count, width)) for _ in groups]
        return [RouterWeights(rows, np.zeros(count), router.context) for rows in random]
    means = [
        _proxy_vectors(seed, settings, expert, data, own) if vector is None else vector
        for expert, data, own, vector in zip(experts, proxies, scores, vectors, strict=True)
    ]
    sample = np.empty(0)
    if router.rows == "fisher" or router.seed_expert:
        sample = np.asarray(public[np.sort(rng.permutation(len(public))[:_COVARIANCE_SAMPLES])], dtype=np.float64)
    if router.seed_expert:
        means.append(sample.mean(axis=0))
    # One group of P / G vectors side by side for each of the G layers that decide.
    by_group = np.stack(means).reshape(count, len(groups), width)
    weights = []
    for group in range(len(groups)):
        covariance = None
        if router.rows == "fisher":
            covariance = shrunk_covariance(sample.reshape(len(sample), len(groups), width)[:, group])
        rows, biases = router_rows(by_group[:, group], covariance)
        if router.seed_expert and router.rows == "fisher":
            biases[-1] += FISHER_ODDS if router.seed_log_odds == "auto" else router.seed_log_odds
        weights.append(RouterWeights(rows, biases, router.context))
    return weights


def _gaussian_router(
    settings: Settings, public: np.ndarray, vectors: np.ndarray, shapes: Sequence[Shape | None]
) -> RouterWeights:
    """The one router of decisions by Gaussians; see :func:`metamoe.common.gaussian.regularised`."""
    router, means = settings.router, vectors.reshape(len(vectors), -1)
    found = client_gaussians(means, shapes, public_coordinates(public), router, router.seed_expert)
    biases = found.biases.copy()
    if router.seed_expert:
        odds = router.seed_log_odds
        biases[-1] += _seed_log_odds(settings, found, public) if odds == "auto" else odds
    quadratic = Quadratic(found.centre, found.projection, found.scales, found.factors)
    return RouterWeights(found.means, biases, router.context, quadratic)


def _seed_log_odds(settings: Settings, gaussians: Gaussians, public: np.ndarray) -> float:
    """Those at which 98% of public samples stay with the seed; lower where more than a fifth of what a client has, by its own
    Gaussian, would then go to the seed: a public set can lie too near to a domain to be told from it.
    """
    rng = np.random.default_rng(derived_seed(settings.seed, _STAGE, 0))
    sample = public[np.sort(rng.permutation(len(public))[:_COVARIANCE_SAMPLES])]
    seen = gaussians.seen(sample.reshape(len(sample), -1).astype(np.float64))
    clients = range(len(gaussians.means) - 1)
    own = [odds_that_keep(gaussians.scores(gaussians.drawn(k, _DRAWN, rng)), _LOST) for k in clients]
    return min(odds_that_keep(gaussians.scores(seen), _KEPT), *own)


def odds_that_keep(scores: np.ndarray, kept: float) -> float:
    """Prior log-odds of the seed against an expert at which this share of samples goes to the seed: the quantile ``kept`` of

    log sum_k exp s_k(z) - s_0(z).

    Args:
        scores: of the samples, the experts' and, last, the seed's, [n, K + 1].
        kept: share of the samples.
    """
    return float(np.quantile(logsumexp(scores[:, :-1], axis=1) - scores[:, -1], kept))


def _proxy_vectors(seed: Seed, settings: Settings, expert: Expert, proxies: Dataset, scores: np.ndarray) -> np.ndarray:
    """Routing vectors of an expert from its proxies alone, [P, d]."""
    share = _EFFECTIVE_SHARE if settings.router.proxy_weights == "relevance" else 1.0
    paths = all_evidence_paths(seed, settings.lora, settings.router)
    model = with_lora(seed, settings.lora, expert)
    return routing_vectors(features(seed, model, paths, settings.data, proxies), tempered_weights(scores, share))


def router_samples(settings: Settings, public: Dataset, proxies: Sequence[Dataset]) -> list[Dataset]:
    """What the router is trained on: a data set for each expert, the seed's being random public samples."""
    rng = np.random.default_rng(derived_seed(settings.seed, _STAGE, 2))
    count = settings.proxies.count
    order = rng.permutation(len(public))
    if settings.router_training.samples == "public":
        return [public.select(np.sort(order[: count * len(proxies)]))]
    return [*proxies, public.select(np.sort(order[:count]))] if settings.router.seed_expert else list(proxies)


def provenance_loss(log_probabilities: Tensor, clients: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy between the client a proxy was chosen for and the mean routing distribution of its tokens.

    Args:
        log_probabilities: log pi, [B, T, K], or [B, 1, K] where all tokens share it.
        clients: int64 [B].
        mask: bool [B, T], true for real tokens; None if all are.

    Returns:
        Scalar: the mean over samples of -log((1/T) sum_t pi_client(z_t)).
    """
    own = log_probabilities.gather(2, clients[:, None, None].expand(-1, log_probabilities.shape[1], 1)).squeeze(2)
    if mask is None or own.shape[1] == 1:
        mask = torch.ones_like(own, dtype=torch.bool)
    total = own.masked_fill(~mask, -torch.inf).logsumexp(dim=1)
    return (mask.sum(dim=1).log() - total).mean()


def train_router(
    model: UnifiedModel,
    seed: Seed,
    settings: Settings,
    samples: Sequence[Dataset],
    progress: Progress,
    kept: Path | None = None,
) -> None:
    """Train routers, experts, or both, as the settings say; the model is changed in place.

    Args:
        model: the unified model.
        seed, settings: the run's.
        samples: see :func:`router_samples`; the k-th data set is the k-th expert's, which is what provenance teaches.
        progress: told of every epoch.
        kept: folder for the state of this training, from which a stopped one goes on; None to keep none.
    """
    training = settings.router_training
    owners = torch.cat([torch.full((len(data),), k) for k, data in enumerate(samples)])
    names = label_space(*map(class_names, samples))
    own = samples_of(seed, settings.data, samples, names)

    for router in model.routers:
        for parameter in router.parameters():
            parameter.requires_grad_(parameter.requires_grad and training.train_router)
    matrices = [p for layer in model.layers for p in (*layer.a.values(), *layer.b.values())]
    for matrix in matrices:
        matrix.requires_grad_(training.train_experts)
    contexts = [router.context for router in model.routers if router.context.requires_grad]
    others = [p for router in model.routers for p in (router.rows, router.biases)] + matrices
    groups = [
        {"params": contexts, "lr": training.context_learning_rate},
        {"params": [p for p in others if p.requires_grad], "lr": training.learning_rate},
    ]
    optimizer = optimizer_of(training.optimizer, groups, 0.0)
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, _STAGE, 1))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    checkpoint = Checkpoint(kept, settings.expert_training.checkpoint_minutes, trained, optimizer, generator)
    curve, parts = Curve(progress), Parts(settings.compute.micro_batch_size)
    for _, rows in checkpoint.steps(training.epochs, len(owners), training.batch_size, curve):

        def loss(batch: Batch, part: Tensor, share: float, count: int = len(rows)) -> Tensor:
            encoded, decisions = model(batch.inputs)
            losses = []
            if training.supervision in ("task", "both"):
                losses.append(share * batch.loss(model.backbone, encoded))
            if training.supervision in ("provenance", "both"):
                clients = owners[part].to(encoded.device)
                mask = batch.inputs.prompt.to(encoded.device) if isinstance(batch.inputs, Tokens) else None
                found = torch.stack([provenance_loss(decision, clients, mask) for decision in decisions]).mean()
                losses.append(len(part) / count * found)
            return torch.stack(losses).sum()

        taken = parts.backward(own, rows, optimizer, loss)
        optimizer.step()
        curve.step(taken, training.learning_rate)
        for router in model.routers:
            router.clamp_context()


def unify(
    seed: Seed,
    settings: Settings,
    experts: Sequence[Expert],
    routers: Sequence[RouterWeights],
    samples: Sequence[Dataset],
    progress: Progress,
    kept: Path | None = None,
) -> UnifiedWeights:
    """Stage 3 from the initial routers on: the unified model, its training, and its weights as they are stored.

    Args:
        seed, settings: the run's.
        experts: each client's.
        routers: see :func:`initial_routers`.
        samples: see :func:`router_samples`.
        progress: told of every epoch.
        kept: see :func:`train_router`.
    """
    model = UnifiedModel(seed, experts, settings.lora, settings.router, routers)
    if settings.router_training.supervision != "none":
        train_router(model, seed, settings, samples, progress, kept)
    return UnifiedWeights([rounded(expert) for expert in model.experts()], [router.weights() for router in model.routers])
