"""Where a simulation computes, on machines whose GPUs are made up: none of ours has one."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError
from metamoe.common.presets import changed
from metamoe.deploy import flower
from metamoe.simulations.flower import run_flower
from metamoe.simulations.placement import placement_of
from metamoe.simulations.prepare import Placement

Machine = Callable[[int], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with so many GPUs, as far as torch says."""

    def with_cards(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
        monkeypatch.setattr("metamoe.common.compute._computes_bfloat16", lambda _: True)

    return with_cards


@pytest.mark.parametrize(
    ("cards", "settings", "share", "clients", "unused"),
    [
        (0, [], 0, "cpu in float32, 2 at a time", []),
        # Half a card for each of two clients, and the server on the same card.
        (1, [], 0.5, "cuda (Card) in float32, 2 at a time with 0.5 of a GPU each", []),
        (1, ["compute.parallel-clients=3"], 0.3333, "cuda (Card) in float32, 3 at a time with 0.3333 of a GPU each", []),
        # No more clients than there are at a time, whatever the setting.
        (1, ["compute.parallel-clients=8"], 0.3333, "cuda (Card) in float32, 3 at a time with 0.3333 of a GPU each", []),
        (2, [], 1, "cuda (Card) in float32, 2 at a time with 1 of a GPU each", []),
        # One card is all that a client uses, however many there are.
        (4, [], 1, "cuda (Card) in float32, 2 at a time with 1 of a GPU each", ["cuda:2, cuda:3 are not used"]),
        (4, ["compute.parallel-clients=3", "compute.server-device=cuda:3"], 1, "3 at a time with 1 of a GPU each", []),
        (1, ["compute.gpus-per-client=1"], 1, "cuda (Card) in float32, 1 at a time with 1 of a GPU each", []),
        (1, ["compute.client-device=cpu"], 0, "cpu in float32, 2 at a time", []),
        (1, ["compute.gpus-per-client=0"], 0, "cpu in float32, 2 at a time", []),
        (1, ["compute.client-device=cpu", "compute.server-device=cpu"], 0, "cpu in float32", ["cuda:0 is not used"]),
        (1, ["compute.precision=bfloat16"], 0.5, "cuda (Card) in bfloat16, 2 at a time with 0.5 of a GPU each", []),
    ],
)
def test_shares_of_clients_on_ray(
    small: Settings, machine: Machine, cards: int, settings: list[str], share: float, clients: str, unused: list[str]
) -> None:
    machine(cards)
    found = placement_of(changed(small, settings), on_ray=True)
    assert (found.cards, found.share) == (cards, share)
    assert clients in found.lines[1]
    assert [warning.partition(";")[0] for warning in found.warnings] == unused


def test_in_one_process_nobody_has_a_share(small: Settings, machine: Machine) -> None:
    machine(2)
    found = placement_of(changed(small, ["compute.client-device=cuda:1"]), on_ray=False)
    assert (found.share, found.warnings) == (0, [])
    assert found.lines == [
        "the server computes on cuda:0 (Card) in float32",
        "clients compute on cuda:1 (Card) in float32, 1 at a time",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("compute.client-device=cuda:1", "compute.client-device = cuda:1: on Ray a client sees only the GPU"),
        ("compute.server-device=cuda:3", "device 'cuda:3' is not here: torch sees 2 GPUs, the last of which is cuda:1"),
        ("compute.gpus-per-client=3", "compute.gpus-per-client = 3: torch sees 2 GPUs here"),
        ("compute.gpus-per-client=1.5", "compute.gpus-per-client = 1.5: above 1, Ray gives whole GPUs only"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(small: Settings, machine: Machine, settings: str, message: str) -> None:
    machine(2)
    with pytest.raises(InvalidSettingError, match=message):
        placement_of(changed(small, [settings]), on_ray=True)


def test_contradictions_are_refused(small: Settings, machine: Machine) -> None:
    with pytest.raises(InvalidSettingError, match=r"gpus-per-client = 0.5 with compute.client-device = cpu"):
        changed(small, ["compute.client-device=cpu", "compute.gpus-per-client=0.5"])
    machine(1)
    contradiction = changed(small, ["compute.client-device=cuda", "compute.gpus-per-client=0"])
    with pytest.raises(InvalidSettingError, match=r"Ray hides every GPU from a client without a share"):
        placement_of(contradiction, on_ray=True)


def test_flower_is_told(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("metamoe.simulations.flower._superlink", lambda _: nullcontext(1))
    monkeypatch.setattr(flower, "run", lambda *arguments, **_: told.append(arguments[-1]))
    for placement in (None, Placement(1, 0.5)):
        run_flower(small, tmp_path, placement=placement)
    assert told == [
        "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2",
        "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2 client-resources-num-gpus=0.5 init-args-num-gpus=1",
    ]
