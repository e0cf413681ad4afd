"""Exactly once: what was released may be sent again to the byte, and nothing else is released in its place."""

import secrets
from pathlib import Path

import numpy as np
import pytest

from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.audit.entries import Entry, Intent, Resent
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import SIMULATION
from metamoe.common.config import Settings
from metamoe.common.errors import PolicyError, ProtocolError
from metamoe.common.presets import changed
from metamoe.common.wire import ARRAYS, AUDIT, decode_terms, encode_reply
from tests.unit.client.test_egress import VECTOR, honest, request, written

pytestmark = pytest.mark.usefixtures("identity")


def test_asked_again_a_client_sends_the_same_bytes_again(small: Settings, tmp_path: Path) -> None:
    site, run = Site(0, tmp_path), secrets.token_hex(16)
    first, second = request(small, run=run), request(small, run=run)
    sent = audited("profile", first, site, lambda _: encode_reply(honest(small)))
    again = audited("profile", second, site, lambda _: pytest.fail("computed"))
    for record in (ARRAYS, AUDIT):
        assert {n: a.data for n, a in sent[record].items()} == {n: a.data for n, a in again[record].items()}
    ledger = Ledger(site.audit).run(run)
    (intent,) = [entry for entry in ledger if isinstance(entry, Intent)]
    (resent,) = [entry for entry in ledger if isinstance(entry, Resent)]
    assert resent.first == intent.message == decode_terms(first).envelope.message
    assert resent.message == decode_terms(second).envelope.message


def test_what_was_computed_leaves_though_the_process_ended_before_its_ledger_knew(
    small: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else noise could be drawn twice, and a server take the mean of both."""
    site, run = Site(0, tmp_path), secrets.token_hex(16)
    append = Ledger.append

    def die(ledger: Ledger, *entries: Entry) -> None:
        if isinstance(entries[-1], Intent):
            raise KeyboardInterrupt
        append(ledger, *entries)

    with monkeypatch.context() as killed:
        killed.setattr(Ledger, "append", die)
        with pytest.raises(KeyboardInterrupt):
            audited("profile", request(small, run=run), site, lambda _: encode_reply(honest(small)))
    sent = audited("profile", request(small, run=run), site, lambda _: pytest.fail("computed"))
    np.testing.assert_allclose(sent[ARRAYS][VECTOR].numpy(), honest(small)[VECTOR], rtol=1e-3)
    assert sum(isinstance(entry, Intent) for entry in Ledger(site.audit).run(run)) == 1


def test_without_its_outbox_a_client_sends_again_only_what_comes_to_the_same(small: Settings, tmp_path: Path) -> None:
    site, run = Site(0, tmp_path), secrets.token_hex(16)
    audited("profile", request(small, run=run), site, lambda _: encode_reply(honest(small)))
    (kept,) = (tmp_path / "outbox").rglob("profile.safetensors")
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    audited("profile", request(small, run=run), site, lambda _: encode_reply(honest(small)))
    other = honest(small) | {VECTOR: -honest(small)[VECTOR]}
    with pytest.raises(PolicyError, match="released 1 times"):
        audited("profile", request(small, run=run), site, lambda _: encode_reply(other))


def test_noise_is_not_drawn_again(small: Settings, tmp_path: Path) -> None:
    settings = changed(small, ["privacy.vectors=gaussian", "privacy.min-samples=30"])
    site, run = Site(0, tmp_path), secrets.token_hex(16)
    audited("profile", request(settings, run=run), site, lambda _: encode_reply(honest(settings)))
    audited("profile", request(settings, run=run), site, lambda _: pytest.fail("computed"))
    for kept in (tmp_path / "outbox").rglob("profile.safetensors"):
        kept.unlink()
    with pytest.raises(PolicyError, match="released 1 times"):
        audited("profile", request(settings, run=run), site, lambda _: pytest.fail("computed"))


def test_what_its_owner_no_longer_allows_is_not_sent_again(small: Settings, tmp_path: Path) -> None:
    run = secrets.token_hex(16)
    audited("profile", request(small, run=run), Site(0, tmp_path), lambda _: encode_reply(honest(small)))
    stricter = SIMULATION.model_copy(update={"allow": {k: r for k, r in SIMULATION.allow.items() if k != VECTOR}})
    site = Site(0, tmp_path, policy=written(stricter, tmp_path))
    with pytest.raises(PolicyError, match=f"does not allow '{VECTOR}'"):
        audited("profile", request(small, run=run), site, lambda _: pytest.fail("computed"))


def test_a_run_keeps_its_settings(small: Settings, tmp_path: Path) -> None:
    site, run = Site(0, tmp_path), secrets.token_hex(16)
    audited("profile", request(small, run=run), site, lambda _: encode_reply(honest(small)))
    with pytest.raises(ProtocolError, match="began with another settings"):
        audited("expert", request(changed(small, ["seed=1"]), "expert", run), site, lambda _: pytest.fail("computed"))
