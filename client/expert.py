"""Stage 2 at the client: a domain expert, trained on private samples and proxies together, and its routing vectors."""

from collections.abc import Callable
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from common.compute import derived_seed
from common.config import Settings
from common.data.datasets import label_space
from common.data.tasks import all_pixels, batches, class_logits, class_names, labels_in, text_features
from common.model.lora import Expert, expert_layers, expert_of, rounded, with_lora
from common.model.routing import routing_vectors
from common.model.seed import Seed, embed

_STAGE = 2


def train_expert(
    seed: Seed,
    settings: Settings,
    client: int,
    private: Dataset,
    proxies: Dataset,
    progress: Callable[[int, int], None],
) -> Expert:
    """Train LoRA on the feed-forward sublayers with cross-entropy against the class names' text features.

    Private and public classes share one label space.

    Args:
        seed: the frozen seed.
        settings: the run's; ``lora`` and ``expert-training`` apply.
        client: number of the client, for its own stream of random numbers.
        private: the client's samples.
        proxies: its public proxies.
        progress: called with epochs done and in all.

    Returns:
        The expert as it is sent, in float16.
    """
    training = settings.expert_training
    space = label_space(class_names(private), class_names(proxies))
    texts = text_features(seed, space, settings.data.prompt)
    pixels = torch.cat([all_pixels(seed, private), all_pixels(seed, proxies)])
    labels = torch.cat([labels_in(private, space), labels_in(proxies, space)])

    generator = torch.Generator().manual_seed(derived_seed(settings.seed, _STAGE, client))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        model = with_lora(seed, settings.lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    steps = -(-len(labels) // training.batch_size) * training.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training.warmup_steps, steps))
    for epoch in range(training.epochs):
        progress(epoch, training.epochs)
        for rows in torch.randperm(len(labels), generator=generator).split(training.batch_size):
            loss = F.cross_entropy(class_logits(model, embed(model, pixels[rows]), texts), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    progress(training.epochs, training.epochs)
    return rounded(expert_of(model))


def expert_routing_vectors(seed: Seed, settings: Settings, expert: Expert, private: Dataset, proxies: Dataset) -> np.ndarray:
    """The routing vectors of an expert as it is sent: means over the private samples and the proxies. float32 [L, d]."""
    paths, model = expert_layers(seed, settings.lora), with_lora(seed, settings.lora, expert)
    samples = chain(batches(seed, private), batches(seed, proxies))
    return routing_vectors(model, paths, samples).astype(np.float32)


def _rate(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))
