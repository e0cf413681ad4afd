"""Stage 2 at the client: a domain expert, trained on private samples and proxies together, and its routing vectors."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from metamoe.common.checkpoint import Checkpoint
from metamoe.common.compute import derived_seed, optimizer_of
from metamoe.common.config import ExpertTraining, Settings
from metamoe.common.curve import VALIDATION_ACCURACY, VALIDATION_LOSS, Curve, Progress
from metamoe.common.data.datasets import fingerprint
from metamoe.common.data.metrics import answered
from metamoe.common.data.tasks import Parts, Samples, features, samples_of
from metamoe.common.model.batch import Batch
from metamoe.common.model.inputs import encode
from metamoe.common.model.lora import Expert, expert_of, rounded, with_lora
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import all_evidence_paths, routing_vectors

_STAGE = 2


def expert_samples(settings: Settings, private: Dataset, proxies: Dataset) -> list[Dataset]:
    """What an expert is trained on, and its routing vectors are means of: private samples and proxies, or one of them alone."""
    return {"aligned": [private, proxies], "private": [private], "proxies": [proxies]}[settings.expert_training.samples]


def train_expert(
    seed: Seed,
    settings: Settings,
    client: int,
    samples: Sequence[Dataset],
    space: Sequence[str],
    progress: Progress,
    start: Expert | None = None,
    kept: Path | None = None,
    validation: Dataset | None = None,
) -> Expert:
    """Train LoRA on the feed-forward sublayers: by cross-entropy against the class names' text features, or by the next-token
    loss on the answers of questions.

    Args:
        seed: the frozen seed.
        settings: the run's; ``lora`` and ``expert-training`` apply.
        client: number of the client, for its own stream of random numbers.
        samples: the data sets of :func:`expert_samples`.
        space: the class names told apart: private and public ones in one label space, whatever it is trained on; of questions
            none.
        progress: told of every epoch.
        start: the expert to go on from; None for a new one.
        kept: folder for the state of this training, from which a stopped one goes on; None to keep none.
        validation: what ``expert-training.evaluate-every`` and ``patience`` go by; None for no validation.

    Returns:
        The expert as it is sent, in float16.
    """
    training = settings.expert_training
    own = samples_of(seed, settings.data, samples, space)
    count = len(own.answers)

    generator = torch.Generator().manual_seed(derived_seed(settings.seed, _STAGE, client))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        model = with_lora(seed, settings.lora, start)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(training.optimizer, [{"params": parameters, "lr": training.learning_rate}], training.weight_decay)
    steps = -(-count // training.batch_size) * training.epochs
    validate = None
    if validation is not None and training.evaluate_every:
        validate = partial(validated, model, samples_of(seed, settings.data, [validation], space))
    curve = Curve(progress, parameters, validate, training.evaluate_every, training.patience)
    checkpoint = Checkpoint(kept, training.checkpoint_minutes, parameters, optimizer, generator)
    parts = Parts(settings.compute.micro_batch_size)

    def loss(batch: Batch, _rows: Tensor, share: float) -> Tensor:
        return share * batch.loss(model, encode(model, batch.inputs))

    for step, rows in checkpoint.steps(training.epochs, count, training.batch_size, curve):
        rate = training.learning_rate * _rate(training, steps, step)
        optimizer.param_groups[0]["lr"] = rate
        taken = parts.backward(own, rows, optimizer, loss)
        optimizer.step()
        curve.step(taken, rate)
    return rounded(expert_of(model))


def validated(model: PreTrainedModel, samples: Samples) -> dict[str, float]:
    """``validation-loss``, the mean of the right answers' negative log-likelihoods (of text without its end, which training
    counts), and ``validation-accuracy`` in percent.
    """
    found = answered(lambda batch: batch.scores(model, encode(model, batch.inputs)), samples)
    right = found.chosen.eq(samples.answers)
    return {VALIDATION_LOSS: -found.likelihood.mean().item(), VALIDATION_ACCURACY: 100 * right.float().mean().item()}


def expert_key(
    seed: Seed,
    settings: Settings,
    client: int,
    samples: Sequence[Dataset],
    space: Sequence[str],
    validation: Dataset | None = None,
) -> str:
    """Hash of everything that decides what :func:`train_expert` returns: where it is the same, an expert need not be trained
    again.
    """
    training = settings.expert_training
    early = (training.evaluate_every, training.patience, fingerprint(validation)) if validation and training.patience else None
    made_of = (
        seed.fingerprint,
        settings.lora.model_dump(),
        training.model_dump(exclude={"checkpoint_minutes", "evaluate_every", "patience"}),
        early,
        (settings.compute.precision + seed.computed_by, settings.compute.micro_batch_size),
        settings.privacy.model_dump() if settings.privacy.expert != "none" else None,
        settings.data.prompt,
        # What is kept of a text; images have no tokens.
        None if seed.is_image_model else (settings.data.prompt_tokens, settings.data.answer_tokens),
        settings.seed,
        client,
        [fingerprint(data) for data in samples],
        list(space),
        torch.__version__,
        torch.get_num_threads(),
    )
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def expert_routing_vectors(seed: Seed, settings: Settings, expert: Expert, samples: Sequence[Dataset]) -> np.ndarray:
    """The routing vectors of an expert as it is sent: means over what it was trained on, in its own states. float32 [P, d], one
    for each FFN input that a router looks at.
    """
    paths = all_evidence_paths(seed, settings.lora, settings.router)
    model = with_lora(seed, settings.lora, expert)
    parts = chain.from_iterable(features(seed, model, paths, settings.data, data) for data in samples)
    return routing_vectors(parts).astype(np.float32)


def _rate(training: ExpertTraining, steps: int, step: int) -> float:
    """Linear warm-up; then constant, or linear decay to zero at the last step."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return 1.0
    return max(0.0, (steps - step) / max(1, steps - training.warmup_steps))
