"""Flower's own commands, where they fail."""

import json
import sys
from pathlib import Path

import pytest

from metamoe.common.errors import RunFailedError
from metamoe.deploy import flower

_ENDED = json.dumps({"success": True, "runs": [{"run-id": "7", "status": "finished:completed"}]})


def _flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> tuple[Path, Path]:
    """A command ``flwr`` in place of Flower's, which cannot be made to fail when it is wanted; a home and a run's folder."""
    programs, out = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    (programs / "flwr").write_text(f"#!/bin/sh\n{body}\n")
    (programs / "flwr").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setattr(flower, "_STATUS_SECONDS", 0)
    monkeypatch.setattr(flower, "_POLL_SECONDS", 0)
    (out / "server").mkdir(parents=True)
    (out / "server" / "flower-run").write_text("7")
    return tmp_path, out


def test_a_question_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, out = _flwr(tmp_path, monkeypatch, f"echo asked >> asked; test $(wc -l < asked) -gt 2 && echo '{_ENDED}'")
    flower.follow(home, "simulation", out)
    assert (home / "asked").read_text().count("asked") == 3


def test_one_that_always_fails_does_and_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, out = _flwr(tmp_path, monkeypatch, "echo asked >> asked; exit 3")
    with pytest.raises(RunFailedError, match="flwr list failed: without a reason, with exit code 3"):
        flower.follow(home, "simulation", out)
    assert (home / "asked").read_text().count("asked") == 4


def test_what_flower_says_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"success": False, "error-message": "no such run"})
    home, out = _flwr(tmp_path, monkeypatch, f"echo '{answer}'; exit 1")
    with pytest.raises(RunFailedError, match="flwr stop failed: no such run"):
        flower.end(home, "simulation", out)
