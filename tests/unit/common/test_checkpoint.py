"""Training stopped anywhere goes on to the same bits, also from the state before where the newest is damaged."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from metamoe.common.checkpoint import Checkpoint
from metamoe.common.compute import optimizer_of
from metamoe.common.curve import Curve, unwatched

EPOCHS, COUNT, SIZE = 3, 10, 4
STEPS = EPOCHS * 3


class Stop(Exception):
    """The process ends here."""


def train(folder: Path | None, optimizer: str, stop: int | None = None, minutes: float = 1e-9) -> tuple[Tensor, list[int]]:
    """What a small training comes to, and the steps that were taken; stopped before a step, or to its end."""
    data = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(torch.ones(3))
    generator = torch.Generator().manual_seed(2)
    optimizing = optimizer_of(optimizer, [{"params": [weight], "lr": 0.1}], 0.01)
    taken = []
    for step, rows in Checkpoint(folder, minutes, [weight], optimizing, generator).steps(EPOCHS, COUNT, SIZE, Curve(unwatched)):
        if step == stop:
            raise Stop
        taken.append(step)
        optimizing.zero_grad()
        (data[rows] @ weight - rows).square().mean().backward()
        optimizing.step()
    return weight.detach(), taken


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", range(STEPS))
def test_stopped_before_any_step_it_goes_on_from_there(tmp_path: Path, optimizer: str, stop: int) -> None:
    whole, taken = train(None, optimizer)
    assert taken == list(range(STEPS))
    with pytest.raises(Stop):
        train(tmp_path, optimizer, stop)
    rest, taken = train(tmp_path, optimizer)
    assert torch.equal(rest, whole)
    # Before a step, what the one before did is saved: nothing but the beginning is done twice.
    assert taken == list(range(stop, STEPS))


def test_without_minutes_every_epoch_is_saved(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path, "adamw", 5, minutes=0)
    rest, taken = train(tmp_path, "adamw", minutes=0)
    assert torch.equal(rest, train(None, "adamw")[0])
    assert taken == list(range(3, STEPS))


def test_a_finished_training_takes_no_step(tmp_path: Path) -> None:
    whole, _ = train(tmp_path, "adamw")
    again, taken = train(tmp_path, "adamw")
    assert torch.equal(again, whole)
    assert taken == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    with pytest.raises(Stop):
        train(tmp_path, "adamw", 7)
    older, newest = sorted(tmp_path.iterdir())
    harm(newest, damage)
    rest, taken = train(tmp_path, "adamw")
    assert torch.equal(rest, train(None, "adamw")[0])
    assert taken == list(range(6, STEPS))
    for file in tmp_path.iterdir():
        harm(file, damage)
    rest, taken = train(tmp_path, "adamw")
    assert torch.equal(rest, train(None, "adamw")[0])
    assert taken == list(range(STEPS))
    assert older.parent == tmp_path


def test_two_states_are_kept_at_most(tmp_path: Path) -> None:
    train(tmp_path, "adamw")
    assert len(list(tmp_path.iterdir())) == 2


def harm(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            file.write_bytes(content[:-3])
        case "flipped":
            content[len(content) - 5] ^= 4
            file.write_bytes(content)
        case "empty":
            file.write_bytes(b"")
        case "gone":
            file.unlink()
