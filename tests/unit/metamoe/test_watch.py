"""What one sees of a run: from another terminal, and in a log."""

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from metamoe import progress
from metamoe.common.errors import InputFileError
from metamoe.common.events import Event, EventLog
from metamoe.common.files import alone
from metamoe.progress import Lines
from metamoe.server.journal import JOURNAL
from metamoe.status import run_status


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


def test_of_many_clients_a_log_does_not_name_each() -> None:
    shown = io.StringIO()
    lines = Lines(Console(file=shown), 21)
    for done in range(21):
        lines.show(Event("profile", done + 1, 21, f"client-{done}"))
    assert len(shown.getvalue().splitlines()) == 1
