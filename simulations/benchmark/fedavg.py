"""Federated averaging of one LoRA adapter, as Flower's users do it today: the baseline that sends weights every round."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from metamoe.client.expert import train_expert
from metamoe.common.arrays import read_arrays, write_arrays
from metamoe.common.compute import derived_seed
from metamoe.common.config import Settings
from metamoe.common.curve import LOSS, RATE, Progress, unwatched
from metamoe.common.data.datasets import label_space
from metamoe.common.data.tasks import class_names
from metamoe.common.errors import StateFileError
from metamoe.common.model.lora import Expert, expert_of, with_lora
from metamoe.common.model.seed import Seed

_STAGE = 4
_COUNT = "num-examples"


def federated_average(
    seed: Seed,
    settings: Settings,
    private: Sequence[Dataset],
    public: Dataset,
    rounds: int,
    kept: Path | None = None,
    progress: Progress = unwatched,
) -> Expert:
    """One adapter after ``rounds`` rounds of FedAvg (McMahan et al., 2017) over the LoRA matrices.

    In each round every client trains the current adapter on its private samples, for as many epochs that all rounds together
    are those of one expert; the matrices are averaged with the clients' numbers of samples as weights, which FedAvg has them
    send.

    Args:
        seed, settings: of the run; learning rate and epochs are the experts', the rate falling over the rounds and within each.
        private: each client's samples.
        public: the public set, for its class names only.
        rounds: at most the experts' epochs, which they divide.
        kept: file for the adapter after the last round that is done, from which a stopped training goes on; None to keep none.
        progress: told of every round: the clients' mean loss in their last epoch of it, weighted as their matrices are, and the
            learning rate that the round began with.
    """
    training = settings.expert_training
    spaces = [label_space(class_names(data), class_names(public)) for data in private]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, _STAGE))
        shared = expert_of(with_lora(seed, settings.lora))
    done = 0
    # A damaged state is not worth a failure.
    with suppress(StateFileError):
        if kept is not None:
            arrays, about = read_arrays(kept)
            shared, done = {name: torch.from_numpy(array) for name, array in arrays.items()}, about["rounds"]
    for number in range(done, rounds):
        # Falling to zero within a round alone, the rate starts anew in each: 69 in place of 72 on preset glyphs.
        rate = training.learning_rate * (1 - number / rounds)
        local = training.model_copy(update={"epochs": training.epochs // rounds, "learning_rate": rate})
        # Another seed in every round: another order of the samples.
        order = derived_seed(settings.seed, _STAGE, number)
        own = settings.model_copy(update={"expert_training": local, "seed": order})
        replies, losses = [], []
        for client, (data, space) in enumerate(zip(private, spaces, strict=True)):
            last = _Last()
            trained = train_expert(seed, own, client, [data], space, last, start=shared)
            replies.append(_reply(trained, len(data)))
            losses.append(last.loss)
        record = aggregate_arrayrecords(replies, _COUNT)
        shared = {name: torch.from_numpy(array.numpy()).float() for name, array in record.items()}
        if kept is not None:
            write_arrays(kept, {name: tensor.numpy() for name, tensor in shared.items()}, {"rounds": number + 1})
        mean = float(np.average(losses, weights=[len(data) for data in private]))
        progress(number + 1, rounds, metrics={LOSS: mean, RATE: rate})
    return shared


class _Last:
    """The loss of the last epoch of a training."""

    loss = 0.0

    def __call__(self, done: int, total: int, *, metrics: Mapping[str, float] | None = None) -> None:  # noqa: ARG002
        self.loss = (metrics or {}).get(LOSS, self.loss)


def _reply(expert: Expert, samples: int) -> RecordDict:
    arrays = {name: Array(tensor.float().numpy().astype(np.float32)) for name, tensor in expert.items()}
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({_COUNT: samples})})
