"""Stage 3: assemble one Mixture-of-Experts and train its router on the proxies."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from common.compute import derived_seed
from common.config import Settings
from common.data.tasks import all_pixels, batches, class_logits, class_names, labels_in, text_features
from common.fisher import shrunk_covariance
from common.model.artifact import UnifiedWeights
from common.model.lora import Expert, expert_layers, rounded, with_lora
from common.model.moe import RouterWeights, UnifiedModel
from common.model.routing import mean_ffn_inputs, router_rows, routing_vectors
from common.model.seed import Seed

_STAGE = 3
_COVARIANCE_SAMPLES = 4_000


def initial_routers(
    seed: Seed,
    settings: Settings,
    public: Dataset,
    proxies: Sequence[Dataset],
    experts: Sequence[Expert],
    vectors: Sequence[np.ndarray | None],
) -> list[RouterWeights]:
    """Routers as they start, one for each layer that decides.

    Args:
        seed, settings: the run's.
        public: D0, of which a sample gives the covariance for Fisher rows.
        proxies: each client's.
        experts: each client's.
        vectors: each client's routing vectors [L, d]; without them, the means over its proxies in its expert are taken.
    """
    router = settings.router
    paths = expert_layers(seed, settings.lora)
    means = np.stack(
        [
            routing_vectors(with_lora(seed, settings.lora, expert), paths, batches(seed, data)) if vector is None else vector
            for expert, data, vector in zip(experts, proxies, vectors, strict=True)
        ]
    )
    deciding = paths[:1] if router.decide == "once" else paths
    covariances: list[np.ndarray | None] = [None] * len(deciding)
    if router.rows == "fisher":
        rng = np.random.default_rng(derived_seed(settings.seed, _STAGE, 0))
        sample = public.select(np.sort(rng.permutation(len(public))[:_COVARIANCE_SAMPLES]))
        features = torch.cat(list(mean_ffn_inputs(seed.model, deciding, batches(seed, sample)))).numpy()
        covariances = [shrunk_covariance(features[:, layer]) for layer in range(len(deciding))]
    return [
        RouterWeights(*router_rows(means[:, layer], covariance), router.context) for layer, covariance in enumerate(covariances)
    ]


def provenance_loss(log_probabilities: Tensor, clients: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy between the client a proxy was chosen for and the mean routing distribution of its tokens.

    Args:
        log_probabilities: log pi, [B, T, K].
        clients: int64 [B].
        mask: bool [B, T], true for real tokens; None if all are.

    Returns:
        Scalar: the mean over samples of -log((1/T) sum_t pi_client(z_t)).
    """
    own = log_probabilities.gather(2, clients[:, None, None].expand(-1, log_probabilities.shape[1], 1)).squeeze(2)
    if mask is None:
        mask = torch.ones_like(own, dtype=torch.bool)
    total = own.masked_fill(~mask, -torch.inf).logsumexp(dim=1)
    return (mask.sum(dim=1).log() - total).mean()


def train_router(
    model: UnifiedModel, seed: Seed, settings: Settings, proxies: Sequence[Dataset], progress: Callable[[int, int], None]
) -> None:
    """Train routers, and experts if the settings say so, on the union of all proxies; the model is changed in place."""
    training = settings.router_training
    pixels = torch.cat([all_pixels(seed, data) for data in proxies])
    clients = torch.cat([torch.full((len(data),), k) for k, data in enumerate(proxies)])
    names = class_names(proxies[0])
    labels = torch.cat([labels_in(data, names) for data in proxies])
    texts = text_features(seed, names, settings.data.prompt)

    contexts = [router.context for router in model.routers if router.context.requires_grad]
    rows = [p for router in model.routers for p in (router.rows, router.biases) if p.requires_grad]
    matrices = [p for layer in model.layers for p in (layer.a1, layer.b1, layer.a2, layer.b2)]
    for matrix in matrices:
        matrix.requires_grad_(training.train_experts)
    groups = [
        {"params": contexts, "lr": training.context_learning_rate},
        {"params": rows + (matrices if training.train_experts else []), "lr": training.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, _STAGE, 1))
    for epoch in range(training.epochs):
        progress(epoch, training.epochs)
        for batch in torch.randperm(len(labels), generator=generator).split(training.batch_size):
            pooled, decisions = model(pixels[batch])
            losses = []
            if training.supervision in ("task", "both"):
                losses.append(F.cross_entropy(class_logits(model.clip, pooled, texts), labels[batch]))
            if training.supervision in ("provenance", "both"):
                losses.append(torch.stack([provenance_loss(decision, clients[batch]) for decision in decisions]).mean())
            optimizer.zero_grad(set_to_none=True)
            torch.stack(losses).sum().backward()
            optimizer.step()
            for router in model.routers:
                router.clamp_context()
    progress(training.epochs, training.epochs)


def unify(
    seed: Seed,
    settings: Settings,
    public: Dataset,
    proxies: Sequence[Dataset],
    experts: Sequence[Expert],
    vectors: Sequence[np.ndarray | None],
    progress: Callable[[int, int], None],
) -> UnifiedWeights:
    """Stage 3 as a whole: initial routers, the unified model, its training, and its weights as they are stored.

    Arguments as for :func:`initial_routers`; ``progress`` is called with epochs done and in all.
    """
    routers = initial_routers(seed, settings, public, proxies, experts, vectors)
    model = UnifiedModel(seed, experts, settings.lora, settings.router, routers)
    if settings.router_training.supervision != "none":
        train_router(model, seed, settings, proxies, progress)
    return UnifiedWeights([rounded(expert) for expert in model.experts()], [router.weights() for router in model.routers])
