"""What a training shows of itself, and when it ends early."""

from pathlib import Path

import pytest
import torch

from metamoe.common.checkpoint import Checkpoint
from metamoe.common.compute import optimizer_of
from metamoe.common.curve import Curve

COUNT, SIZE, EPOCHS = 10, 4, 8


class Stop(Exception):
    """The process ends here."""


def train(
    folder: Path | None, losses: list[float], patience: int = 0, every: int = 1, stop: int | None = None
) -> tuple[float, list[tuple[int, dict]]]:
    """A weight that grows by 1 a step; each look at validation finds the loss that is listed for its epoch."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = optimizer_of("sgd", [{"params": [weight], "lr": 1.0, "momentum": 0.0}], 0.0)
    told: list[tuple[int, dict]] = []
    curve = Curve(
        lambda done, _total, *, metrics=None: told.append((done, dict(metrics or {}))),
        [weight],
        lambda: {"validation-loss": losses[round(weight.item()) // 3 - 1], "validation-accuracy": 50.0},
        every,
        patience,
    )
    checkpoint = Checkpoint(folder, 0, [weight], optimizer, torch.Generator().manual_seed(1))
    for step, _ in checkpoint.steps(EPOCHS, COUNT, SIZE, curve):
        if step == stop:
            raise Stop
        optimizer.zero_grad()
        (-weight).sum().backward()
        optimizer.step()
        curve.step(torch.tensor(float(step)), 0.5)
    return weight.item(), told


def test_an_epoch_has_the_mean_of_its_losses_and_its_rate() -> None:
    _, told = train(None, [0.0] * EPOCHS, every=0)
    assert [done for done, _ in told] == [*range(EPOCHS + 1)]
    assert told[0] == (0, {})
    # Three steps an epoch: 0, 1, 2, then 3, 4, 5.
    assert told[1] == (1, {"learning-rate": 0.5, "loss": 1.0})
    assert told[2] == (2, {"learning-rate": 0.5, "loss": 4.0})


@pytest.mark.parametrize(("every", "expected"), [(1, list(range(1, 9))), (3, [3, 6, 8]), (20, [8])])
def test_validation_comes_as_often_as_asked_and_at_the_end(every: int, expected: list[int]) -> None:
    _, told = train(None, [0.0] * EPOCHS, every=every)
    assert [done for done, metrics in told if "validation-loss" in metrics] == expected


def test_training_ends_where_validation_gets_no_better_with_the_best_weights() -> None:
    weight, told = train(None, [5.0, 4.0, 6.0, 3.0, 3.0, 7.0, 1.0, 1.0], patience=2)
    # The smallest until then was after the fourth epoch, of three steps each; equal is no better.
    assert weight == 12
    assert [done for done, metrics in told if metrics] == [1, 2, 3, 4, 5, 6]
    assert told[-1] == (EPOCHS, {})


def test_without_patience_the_last_weights_count() -> None:
    weight, _ = train(None, [5.0, 4.0, 6.0, 3.0, 3.0, 7.0, 1.0, 9.0])
    assert weight == 3 * EPOCHS


def test_with_patience_left_the_best_weights_count_all_the_same() -> None:
    weight, _ = train(None, [5.0, 4.0, 6.0, 3.0, 3.0, 7.0, 1.0, 9.0], patience=3)
    assert weight == 21


@pytest.mark.parametrize("stop", range(1, 18))
def test_a_training_that_was_stopped_ends_where_it_would_have(tmp_path: Path, stop: int) -> None:
    losses = [5.0, 4.0, 6.0, 3.0, 3.0, 7.0, 1.0, 1.0]
    with pytest.raises(Stop):
        train(tmp_path, losses, patience=2, stop=stop)
    assert train(tmp_path, losses, patience=2)[0] == 12
    # And once more, when it is over.
    assert train(tmp_path, losses, patience=2)[0] == 12
