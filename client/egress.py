"""The edge of a client: what its policy does not allow does not leave, what leaves is in its ledger first, and no exception's
text goes with it.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from metamoe.client.outbox import Answer, Outbox
from metamoe.client.policy import policy_of
from metamoe.client.private import private_hash
from metamoe.client.records import took_part
from metamoe.client.site import Site, site_of
from metamoe.common.audit.entries import (
    Intent,
    Refusal,
    Spent,
    array_entries,
)
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import DEFAULT, Policy
from metamoe.common.audit.release import allowed_artifacts, check_asked, checked, is_sent_again, open_run, planned_spending
from metamoe.common.audit.terms import keep_settings
from metamoe.common.audit.touching import touching
from metamoe.common.config import Settings
from metamoe.common.data.datasets import public_fingerprint
from metamoe.common.errors import InvalidSettingError, LedgerError, MetaMoEError, PolicyError
from metamoe.common.model.seed import load_seed
from metamoe.common.wire import (
    CLIENT_ERROR_CODE,
    MESSAGE_TYPE,
    Kind,
    RecordDict,
    Request,
    decode_reply,
    decode_terms,
    encode_reply,
    kind_of,
    question_hash,
)


def guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower mod: a reply passes :func:`audited` and is made anew, so that nothing else can travel with it; every failure
    becomes a bare code. Either leaves at a multiple of the policy's time step after the request came.
    """
    site = site_of(context.node_config, context.run_config)
    with padded(site):
        try:
            kind = kind_of(message.metadata.message_type)
            reply: RecordDict | Error = audited(kind, message.content, site, lambda _: call_next(message, context).content)
        except Exception as error:
            reply = Error(CLIENT_ERROR_CODE + _code(error), "")
    # After the wait: a message has the time at which it was made, and what is left of the request's time to live.
    return Message(reply, reply_to=message)


def audited(kind: Kind, content: RecordDict, site: Site, respond: Callable[[RecordDict], RecordDict]) -> RecordDict:
    """A client's reply to a request, as its policy allows it and its ledger has it.

    Args:
        kind: what is asked.
        content: the request.
        site: where this client runs.
        respond: computes the reply.

    Raises:
        InvalidSettingError: the run is without this client, whose ledger has nothing of it.
        PolicyError: the policy does not allow this; where that can be known before, nothing has been computed.
        LedgerError: it could not be written down.
        MetaMoEError: whatever else went wrong. The reason is written to the client's own log, and the code to its ledger.
    """
    try:
        terms = decode_terms(content)
        _check_part(terms, site)
        policy = policy_of(site)
        ledger = Ledger(site.audit)
        open_run(ledger, site.audit, policy, terms)
    except Exception:
        _log(site, kind)
        raise
    try:
        return _answered(kind, terms, content, site, policy, ledger, respond)
    except Exception as error:
        _log(site, kind)
        if not isinstance(error, LedgerError):
            envelope = terms.envelope
            ledger.append(Refusal(run=envelope.run, message=envelope.message, stage=kind, code=_code(error)))
        raise


def _answered(
    kind: Kind,
    terms: Request,
    content: RecordDict,
    site: Site,
    policy: Policy,
    ledger: Ledger,
    respond: Callable[[RecordDict], RecordDict],
) -> RecordDict:
    """The reply, computed and released once in a run, however often it is asked for; what it says of the private samples once
    in all runs, where these count.

    It is on disk before the ledger says that it leaves: whatever ends this process, the same bytes leave later, or none.
    """
    run, message = terms.envelope.run, terms.envelope.message
    introduces = kind == "profile" and terms.only_introduces(site.client)
    check_asked(policy, site.audit, ledger, kind, terms, introduces)
    said = [terms.settings.model_dump(mode="json"), terms.seed, terms.public, list(terms.experts), introduces]
    outbox, asked = Outbox.of_run(site, run), question_hash(said, content)
    spent = [] if introduces else planned_spending(kind, terms.settings)
    once = not introduces and _answers_once(kind, policy, spent)
    ever = _asked_ever(kind, terms.settings, content, site) if once else None
    released = any(isinstance(entry, Intent) and entry.stage == kind for entry in ledger.run(run))
    artifacts = allowed_artifacts(kind, terms.settings, policy, introduces)
    answer = outbox.kept(kind, asked)
    if answer is None and ever and (kept := Outbox.of_all_runs(site, ever).kept(kind, ever)):
        answer = Answer(kept.arrays, _for_the_audit(kind, terms, ledger))
    # Lost from the outbox it may be computed anew, if it comes to the same; noise never would.
    if answer is None and released and not spent and not outbox.holds(kind):
        answer = Answer(decode_reply(respond(content), artifacts), _for_the_audit(kind, terms, ledger))
    if answer and is_sent_again(kind, terms, policy, ledger, array_entries(answer.arrays | answer.audit)):
        return encode_reply(answer.arrays, answer.audit)
    ready = array_entries(answer.arrays) if answer else []

    def compute() -> dict[str, np.ndarray]:
        return decode_reply(encode_reply(answer.arrays) if answer else respond(content), artifacts)

    arrays = checked(kind, terms, artifacts, policy, ledger, spent, ready, compute)
    if kind == "profile" and arrays["client"] != site.client:
        raise PolicyError(f"this is client {site.client}, but the reply says {arrays['client']}")
    extra = _for_the_audit(kind, terms, ledger)
    outbox.keep(kind, asked, Answer(arrays, extra))
    if ever:
        Outbox.of_all_runs(site, ever).keep(kind, ever, Answer(arrays, {}))
    keep_settings(site.audit, terms.settings)
    records = [] if introduces else took_part(kind, terms.settings, site, run)
    ledger.append(*records, Intent(run=run, message=message, stage=kind, arrays=array_entries(arrays | extra), spent=spent))
    if kind == "deliver":
        # It is part of the model that has just come back.
        outbox.forget("expert")
    return encode_reply(arrays, extra)


def _answers_once(kind: Kind, policy: Policy, spent: list[Spent]) -> bool:
    """Whether the same question has the same answer in all runs. It has not where a budget pays for noise drawn anew; and not
    after the model has come back, which is there to be measured.
    """
    return kind != "deliver" and bool(policy.limits.max_distinct_statistics) and not (spent and policy.budget)


def _asked_ever(kind: Kind, settings: Settings, content: RecordDict, site: Site) -> str:
    """Hash of a question by all that decides its answer, and nothing of which run it is. Seed and public set are those that
    this client holds: where they are no longer what they were, an answer from before is none.
    """
    own = load_seed(settings.seed_model).fingerprint, public_fingerprint(settings.data)
    return question_hash([kind, touching(settings), *own, private_hash(site)], content)


def _for_the_audit(kind: Kind, terms: Request, ledger: Ledger) -> dict[str, np.ndarray]:
    """What is added for whoever checks the ledger; with the last reply that is the seal of the run."""
    if kind == "profile":
        return {"audit-key": _octets(ledger.public)}
    if kind == "deliver":
        seal = ledger.seal(terms.envelope.run)
        return {"ledger-root": _octets(seal.root), "ledger-signature": _octets(seal.signature)}
    return {}


def _check_part(terms: Request, site: Site) -> None:
    names = terms.settings.client_names
    if site.client < len(names) and site.client not in terms.settings.members:
        raise InvalidSettingError(f"this is client {names[site.client]}, and the run is without it (setting without)")


@contextmanager
def padded(site: Site) -> Iterator[None]:
    """Let the block end only at a multiple of the policy's time step after it began, unless the gateway sees to that."""
    begin = time.monotonic()
    yield
    if site.behind_gateway:
        return
    try:
        step = policy_of(site).limits.reply_time_step
    except MetaMoEError:
        step = DEFAULT.limits.reply_time_step
    if step:
        time.sleep(-(time.monotonic() - begin) % step)


def _octets(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8)


def _code(error: Exception) -> int:
    return error.exit_code if isinstance(error, MetaMoEError) else MetaMoEError.exit_code


def _log(site: Site, kind: Kind) -> None:
    """The reason stays here, in the client's log: an exception's text may quote private data."""
    # On a disk that is full the reason is lost; what went wrong is still to be said by its code.
    with suppress(OSError):
        site.state.mkdir(parents=True, exist_ok=True)
        with site.log.open("a") as log:
            log.write(f"could not answer {MESSAGE_TYPE[kind]}\n{traceback.format_exc()}\n")
