"""A run that was stopped anywhere goes on to the same model, and every artifact is released once."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.audit.entries import Intent
from metamoe.common.audit.keys import read_public
from metamoe.common.audit.reconcile import reconcile
from metamoe.common.audit.verify import check_ledger
from metamoe.common.config import Settings
from metamoe.common.errors import RunFailedError, StateFileError
from metamoe.common.events import read_events
from metamoe.common.files import alone
from metamoe.common.model.artifact import load_model
from metamoe.common.presets import changed
from metamoe.server import stages
from metamoe.server.journal import JOURNAL
from metamoe.server.stages import run_stages
from metamoe.simulations.local import run_local
from tests.unit.common.test_checkpoint import harm


@pytest.fixture
def expected(finished: Path) -> str:
    """The model of an undisturbed run."""
    return load_model(finished / "model").manifest.model_hash


def run_until(settings: Settings, out: Path, stop: Callable[[str, int, str], bool]) -> None:
    """Run in one process, and end it where ``stop(stage, client, when)`` says: before a client computes, or after it has sent
    what the server will not see.
    """

    def ask(kind, requests) -> Iterator:
        for client, content in requests.items():
            if stop(kind, client, "before"):
                raise KeyboardInterrupt
            reply = audited(
                kind, content, Site(client, out / "clients"), partial(respond, kind, site=Site(client, out / "clients"))
            )
            if stop(kind, client, "after"):
                raise KeyboardInterrupt
            yield client, reply

    with pytest.raises(KeyboardInterrupt):
        run_stages(settings, range(settings.clients), ask, out)


def check(out: Path, settings: Settings, expected: str, deployed: Path | None = None) -> None:
    """The right model everywhere, ledgers that verify and agree, each artifact released once.

    Args:
        out: the run folder.
        settings: the run's.
        expected: hash of the model of an undisturbed run.
        deployed: the folder of a federation's clients, where they are not in the run's.
    """
    assert load_model(out / "model").manifest.model_hash == expected
    summary = json.loads((out / "server" / "summary.json").read_text())
    assert (summary["model"], summary["missing"]) == (expected, [])
    key = read_public(deployed.parent / "server" / "audit.pub") if deployed else None
    server = check_ledger(out / "server" / "audit", key)
    assert server.findings == []
    for number, name in enumerate(settings.client_names):
        state = deployed / f"client-{number}" / "state" if deployed else out / "clients"
        client = check_ledger(state / "audit" / f"client-{number}")
        (run,) = server.runs
        # Deployed clients have ledgers of other runs too.
        findings = [*client.findings, *reconcile(client, server)]
        assert [finding for finding in findings if not deployed or f"run {run[:8]}" in finding.where] == []
        assert [intent.stage for intent in client.of(Intent, run)] == ["profile", "expert", "deliver"]
        assert load_model(state / name / "model").manifest.model_hash == expected
        assert not list((state / name / "training").glob("*"))
    assert not (out / "server" / "training").exists()


def epochs_once(out: Path, settings: Settings) -> None:
    """No client trained an epoch twice that it had saved: it says of each once that it begins, but for one that was stopped in
    the middle, at most.
    """
    for name in settings.client_names:
        begun = [event.done for event, _ in read_events(out / "clients" / name / "events.jsonl")]
        assert len(begun) - len(set(begun)) <= 2
        assert begun == sorted(begun)


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["profile", "expert", "deliver"])
def test_stopped_while_a_client_answers(small: Settings, tmp_path: Path, expected: str, stage: str, when: str) -> None:
    run_until(small, tmp_path, lambda *at: at == (stage, 1, when))
    run_local(small, tmp_path)
    check(tmp_path, small, expected)
    undisturbed = {
        client["name"]: client for client in json.loads((tmp_path / "server" / "summary.json").read_text())["clients"]
    }
    assert all(client["bytes_up"] == 192 * 2 + 4 * 32 + 4 * 16 + 8 + 2 * (32 * 33 // 2) for client in undisturbed.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["public_features", "select_proxies", "write_selections", "merge", "unify", "save_model", "read_weights"]
)
def test_stopped_while_the_server_works(
    small: Settings, tmp_path: Path, expected: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(stages, where, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_local(small, tmp_path)
    run_local(small, tmp_path)
    check(tmp_path, small, expected)


@pytest.mark.slow
def test_stopped_at_every_reply_in_turn(small: Settings, tmp_path: Path, expected: str, run_metamoe) -> None:
    """One run, nine times ended: what has arrived is not asked for again, but who each node is."""
    for stage in ("profile", "expert", "deliver"):
        for client in range(3):
            run_until(small, tmp_path, lambda *at, now=(stage, client, "after"): at == now)
    run_local(small, tmp_path)
    check(tmp_path, small, expected)
    assert run_metamoe("audit", "report", str(tmp_path)) == 0
    assert "sent again, to the byte, 9 times, as the run was interrupted" in (tmp_path / "audit" / "client-0.html").read_text()
    for name in small.client_names:
        epochs = [event.done for event, _ in read_events(tmp_path / "clients" / name / "events.jsonl")]
        # An expert that was trained is read, which is one event more.
        assert epochs.count(0) == 1


@pytest.mark.slow
def test_a_router_whose_training_was_stopped_goes_on(small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = changed(small, ["router-training.epochs=3"])
    run_local(settings, tmp_path / "whole")

    class Interrupting:
        """Ends the run when an epoch has been trained, and nothing of it is kept."""

        def __init__(self, path: Path) -> None:
            self.log = stages_event_log(path)

        def __call__(self, stage: str, done: int, total: int, client: str = "", metrics: Any = None) -> None:
            if (stage, done) == ("unify", 2):
                raise KeyboardInterrupt
            self.log(stage, done, total, client, metrics)

    stages_event_log = stages.EventLog
    with monkeypatch.context() as killed:
        killed.setattr(stages, "EventLog", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            run_local(settings, tmp_path / "run")
    assert any((tmp_path / "run" / "server" / "training").rglob("*.safetensors"))
    run_local(settings, tmp_path / "run")
    whole, rest = (load_model(tmp_path / name / "model").manifest.model_hash for name in ("whole", "run"))
    assert rest == whole
    epochs = [e.done for e, _ in read_events(tmp_path / "run" / "events.jsonl") if e.stage == "unify"]
    assert epochs == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=getattr(pytest.mark, m)) for d, m in (("flipped", "slow"), ("cut", "faults"), ("gone", "faults"))],
)
@pytest.mark.parametrize("what", ["journal", "expert", "profile", "proxies", "model"])
def test_what_is_damaged_is_done_again_or_named(
    small: Settings, finished: Path, tmp_path: Path, expected: str, what: str, damage: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "server" / "summary.json").unlink()
    harm(
        {
            "journal": out / "server" / JOURNAL,
            "expert": out / "server" / "experts" / "greek" / "adapter_model.safetensors",
            "profile": out / "server" / "replies" / "profile" / "greek.safetensors",
            "proxies": out / "proxies.json",
            "model": out / "model" / "router.safetensors",
        }[what],
        damage,
    )
    if (what, damage) == ("journal", "gone"):
        # Without a journal it is another run, whose clients have nothing of it yet.
        run_local(small, out)
        assert load_model(out / "model").manifest.model_hash == expected
        return
    run_local(small, out)
    check(out, small, expected)


def test_a_run_keeps_what_it_began_with(small: Settings, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "server" / "summary.json").unlink()
    with pytest.raises(StateFileError, match="began with settings"):
        run_local(changed(small, ["seed=1"]), out)
    journal = out / "server" / JOURNAL
    content = bytearray(journal.read_bytes())
    content[30] ^= 1
    journal.write_bytes(content)
    with pytest.raises(StateFileError, match="damaged at its beginning"):
        run_local(small, out)


def test_two_processes_do_not_work_on_one_run(small: Settings, tmp_path: Path) -> None:
    with alone(tmp_path / "server"), pytest.raises(RunFailedError, match="another process works in"):
        run_local(small, tmp_path)


def test_a_finished_run_is_left_as_it_is(small: Settings, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    run_stages(small, [0, 1, 2], lambda *_: pytest.fail("asked"), out)
