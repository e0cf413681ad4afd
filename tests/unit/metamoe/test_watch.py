"""What one sees of a run: from another terminal, and in a log."""

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from metamoe import progress
from metamoe.common.errors import InputFileError
from metamoe.common.events import Event, EventLog
from metamoe.common.files import alone
from metamoe.deploy import flower
from metamoe.progress import Board, Lines, memory_used
from metamoe.server.journal import JOURNAL
from metamoe.status import run_status, seconds_left


@pytest.fixture
def stopped(finished: Path, tmp_path: Path, small) -> Path:
    """A run that was stopped while experts trained: one of three has come back."""
    from metamoe.common.presets import to_toml

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "settings.toml").write_text(to_toml(small))
    (out / "server" / "summary.json").unlink()
    journal = out / "server" / JOURNAL
    lines = journal.read_text().splitlines(keepends=True)
    until = next(i for i, line in enumerate(lines) if '"kind": "expert"' in line) + 1
    journal.write_text("".join(lines[:until]))
    return out


def test_the_status_of_a_run_that_stopped_goes_on_or_ended(stopped: Path, run_metamoe, capsys) -> None:
    found = run_status(stopped)
    assert found.state == "stopped"
    assert found.stages == {"profile": (3, 3), "select": (1, 1), "expert": (1, 3), "unify": (0, 1), "deliver": (0, 3)}
    assert found.clients == {"digits": (1, 1), "greek": (1, 1), "arrows": (1, 1)}
    assert run_metamoe("status", str(stopped)) == 0
    assert f"'metamoe resume {stopped}' goes on with it" in capsys.readouterr().out
    with alone(stopped / "server"):
        assert run_status(stopped).state == "running"
    (stopped / "server" / "summary.json").write_text("{}")
    assert run_status(stopped).state == "finished"


def test_a_run_whose_flower_is_still_starting_is_running(stopped: Path) -> None:
    (stopped / "flower").mkdir(exist_ok=True)
    flower.start(["sleep", "600"], stopped / "flower", stopped / "sleep.log")
    try:
        assert run_status(stopped).state == "running"
    finally:
        flower.stop_all(stopped / "flower")
    assert run_status(stopped).state == "stopped"


def test_the_status_has_losses_the_time_left_and_memory(
    stopped: Path, run_metamoe, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(stopped / "clients" / "greek" / "events.jsonl")
    with monkeypatch.context() as clock:
        for second, done in ((1000, 0), (1030, 1), (1060, 2)):
            clock.setattr("metamoe.common.events.time.time", lambda second=second: second)
            log("expert", done, 5, "greek", {"loss": 2.0 / (done + 1), "learning-rate": 0.1})
    with alone(stopped / "server"):
        assert run_metamoe("status", str(stopped)) == 0
    shown = capsys.readouterr().out
    # Two epochs took a minute, and three are left.
    assert "greek: 2 of 5 of its training, loss 0.667, 0:01:30 left" in shown
    assert re.search(r"memory [\d.]+ of [\d.]+ GiB", shown)


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ((), 0.0),
        ((2,), 0.0),
        ((0, 1, 2), 30.0),
        # Begun anew after a stop: the steps before it say nothing.
        ((0, 1, 2, 3, 0, 1), 40.0),
        ((0, 1, 5), 0.0),
    ],
)
def test_time_left_goes_by_the_steps_since_a_training_was_last_taken_up(done: tuple[int, ...], expected: float) -> None:
    log = [Event("expert", steps, 5, "greek", 100.0 + 10 * i) for i, steps in enumerate(done)]
    assert seconds_left(log) == pytest.approx(expected)


def test_who_is_waited_for_is_in_the_status_until_it_is_back(stopped: Path) -> None:
    events = EventLog(stopped / "events.jsonl")
    events("waiting", 0, 1, "client greek")
    assert list(run_status(stopped).waiting) == ["client greek"]
    events("waiting", 1, 1, "client greek")
    assert run_status(stopped).waiting == {}


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"holds no settings\.toml"):
        run_status(tmp_path)


def test_a_log_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    lines = Lines(Console(file=shown, width=40), 3)
    lines.show(Event("expert", 0, 3))
    lines.show(Event("expert", 1, 3, "digits"))
    lines.show(Event("expert", 4, 9, "greek"), own=True)
    lines.show(Event("waiting", 0, 1, "client arrows"))
    lines.tick()
    said = [line.partition(" ")[2] for line in shown.getvalue().splitlines()]
    assert said == ["2 clients train experts", "2 clients train experts: digits (1 of 3)", "waiting for client arrows"]
    monkeypatch.setattr(progress, "_MINUTE", 0)
    lines.tick()
    last = shown.getvalue().splitlines()[-1]
    assert "2 clients train experts: 1 of 3; greek 4/9; waiting for client arrows since " in last


def test_a_training_shows_its_loss_in_bars_and_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    event = Event("expert", 2, 9, "greek", metrics={"loss": 0.51234, "learning-rate": 0.1, "validation-accuracy": 78.04})
    text = io.StringIO()
    with Progress(TextColumn("{task.description} {task.fields[note]}"), console=Console(file=text, width=120)) as bars:
        board = Board(bars, 3)
        board.show(event, own=True)
        board.tick()
    assert re.search(r"greek loss 0.512, 78.0%", text.getvalue())
    assert re.search(r"memory [\d.]+ of [\d.]+ GiB", text.getvalue())
    shown = io.StringIO()
    lines = Lines(Console(file=shown), 3)
    lines.show(Event("expert", 0, 3))
    lines.show(event, own=True)
    monkeypatch.setattr(progress, "_MINUTE", 0)
    lines.tick()
    assert re.search(r"greek 2/9 loss 0.512, 78.0%; memory [\d.]+ of", shown.getvalue())


def test_the_memory_of_cards_is_what_their_own_tool_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in place of the tool, as there is no card here."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, 20480, 81559'\necho '1, 512, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert memory_used().endswith("card 0 20.0 of 79.6 GiB, card 1 0.5 of 79.6 GiB")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "card" not in memory_used()


def test_of_many_clients_a_log_does_not_name_each() -> None:
    shown = io.StringIO()
    lines = Lines(Console(file=shown), 21)
    for done in range(21):
        lines.show(Event("profile", done + 1, 21, f"client-{done}"))
    assert len(shown.getvalue().splitlines()) == 1
