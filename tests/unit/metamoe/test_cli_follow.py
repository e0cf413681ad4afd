"""``metamoe audit watch``: each message as it is written down, and pages that are read anew."""

import shutil
from pathlib import Path

import pytest

from metamoe import cli_follow


def test_a_run_is_followed_to_its_end(
    finished: Path, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, pages = tmp_path / "run", tmp_path / "run" / "audit"
    (run / "clients").mkdir(parents=True)
    looks = []

    def next_thing(_: float) -> None:
        """There is no ledger at first; then one, of a run that goes on; then the run has ended."""
        looks.append((pages / "index.html").read_text() if (pages / "index.html").exists() else "")
        if len(looks) == 1:
            shutil.copytree(finished / "clients" / "audit", run / "clients" / "audit")
        else:
            shutil.copytree(finished / "server", run / "server")

    monkeypatch.setattr(cli_follow.time, "sleep", next_thing)
    assert run_metamoe("audit", "watch", str(run)) == 0
    shown = capsys.readouterr().out
    assert looks[0] == ""
    assert '<meta http-equiv="refresh" content="5">' in looks[1]
    # The run has ended: nothing is new any more.
    assert "refresh" not in (pages / "index.html").read_text()
    assert shown.count("client-0, expert: sends expert: ") == 1
    assert shown.count("server, expert: ") == 3
    assert shown.count("sends client, seed-routing-vector, seed-ffn-inputs, seed-shape, ledger: ") == 3
