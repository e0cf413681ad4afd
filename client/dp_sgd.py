"""Training an expert with differential privacy: DP-SGD (Abadi et al. 2016) on its LoRA parameters, by Opacus."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from metamoe.client.expert import validated
from metamoe.common.checkpoint import Checkpoint
from metamoe.common.config import Settings
from metamoe.common.curve import LOSS, RATE, Progress
from metamoe.common.data.image_batches import all_pixels
from metamoe.common.data.tasks import labels_in, samples_of
from metamoe.common.model.batch import class_logits, text_features
from metamoe.common.model.inputs import embed
from metamoe.common.model.lora import Expert, expert_of, rounded, with_lora
from metamoe.common.model.seed import Seed
from metamoe.common.privacy import Mechanism


def train_with_privacy(
    seed: Seed,
    settings: Settings,
    private: Dataset,
    space: Sequence[str],
    start: Expert,
    mechanism: Mechanism,
    rng: np.random.Generator,
    progress: Progress,
    kept: Path | None = None,
    validation: Dataset | None = None,
) -> Expert:
    """Go on from an expert that no private sample has touched, with clipped and noisy gradients of the private samples.

    Each step takes every sample with probability ``mechanism.sampling_rate``, clips its gradient to C, and divides the sum,
    with Gaussian noise of standard deviation C x ``noise_multiplier``, by the public number ``privacy.expert-batch-size``.
    Steps, rate and noise are the settings'; only the time a step takes depends on how many samples there are.

    Args:
        seed: the frozen seed.
        settings: the run's; ``privacy`` and ``lora`` apply.
        private: the private training samples.
        space: the class names told apart.
        start: the expert to go on from.
        mechanism: of :func:`metamoe.common.privacy.expert_mechanism`.
        rng: where sampling and noise come from.
        progress: told of steps done and in all, with each one's loss, which like the data is the client's own.
        kept: folder for the state of this training, from which a stopped one goes on with the same samples and noise, so that
            no step is taken twice in different ways; None to keep none.
        validation: what ``expert-training.evaluate-every`` looks at, for the client's eyes alone; None for no validation.

    Returns:
        The expert as it is sent, in float16.
    """
    # Slow to import, and for those who ask for it.
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    privacy = settings.privacy
    texts = text_features(seed, space, settings.data.prompt)
    pixels, labels = all_pixels(seed, [private]), labels_in(private, space)
    model = with_lora(seed, settings.lora, start)
    observed = GradSampleModule(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # The noise is drawn where it is added.
    generator = torch.Generator(seed.model.device).manual_seed(int(rng.integers(2**63)))
    optimizer = DPOptimizer(
        torch.optim.AdamW(parameters, lr=privacy.expert_learning_rate, weight_decay=0.0),
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=privacy.expert_clip,
        expected_batch_size=privacy.expert_batch_size,
        generator=generator,
    )
    checkpoint = Checkpoint(kept, settings.expert_training.checkpoint_minutes, parameters, optimizer, generator)
    begun, _ = checkpoint.restore()
    per_epoch = -(-mechanism.steps // privacy.expert_epochs)
    every = settings.expert_training.evaluate_every * per_epoch
    held_out = samples_of(seed, settings.data, [validation], space) if validation is not None and every else None
    metrics = {RATE: privacy.expert_learning_rate}
    if begun:
        rng.bit_generator.state = begun["rng"]
    for step in range(begun.get("step", 0), mechanism.steps):
        if step % per_epoch == 0 or checkpoint.due():
            checkpoint.save({"step": step, "rng": rng.bit_generator.state})
        found = validated(model, held_out) if held_out and step and step % every == 0 else {}
        progress(step, mechanism.steps, metrics=metrics | found)
        chosen = torch.from_numpy(np.flatnonzero(rng.random(len(labels)) < mechanism.sampling_rate))
        optimizer.zero_grad(set_to_none=True)
        if len(chosen):
            logits = class_logits(model, embed(model, pixels[chosen]), texts)
            with warnings.catch_warnings():
                # The lowest matrices get inputs that need no gradient: torch warns of it at every step, and it does no harm.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                loss = F.cross_entropy(logits, labels[chosen].to(logits.device))
                loss.backward()
            metrics[LOSS] = loss.item()
        else:
            # The noise is added all the same: that nobody was chosen is not to be seen either.
            for parameter in parameters:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        optimizer.step()
    progress(mechanism.steps, mechanism.steps, metrics=metrics | (validated(model, held_out) if held_out else {}))
    observed.remove_hooks()
    return rounded(expert_of(model))
