"""The edge of a client: what its policy does not allow does not leave, what leaves is in its ledger first, and no exception's
text goes with it.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

import numpy as np
from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from metamoe.client.outbox import Answer, Outbox
from metamoe.client.policy import permitted, policy_of
from metamoe.client.private import private_hash
from metamoe.client.site import Site, site_of
from metamoe.common.audit.code import code_hash
from metamoe.common.audit.entries import (
    ArrayEntry,
    Entry,
    Intent,
    Open,
    Receipt,
    Refusal,
    Resent,
    Spent,
    array_entries,
    digest_of,
    receipt_statement,
    settings_hash,
)
from metamoe.common.audit.keys import signed_by
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import DEFAULT, Policy, check_arrays, check_budget, check_request, policy_hash, policy_text
from metamoe.common.audit.terms import Terms, check_statistics, check_terms, first_terms, keep_settings
from metamoe.common.audit.touching import touching
from metamoe.common.config import Settings
from metamoe.common.data.datasets import public_fingerprint
from metamoe.common.errors import InvalidSettingError, LedgerError, MetaMoEError, PolicyError, ProtocolError
from metamoe.common.files import write_atomically
from metamoe.common.model.seed import load_seed
from metamoe.common.privacy import expert_mechanism, vectors_mechanism
from metamoe.common.wire import (
    AUDIT_ARTIFACTS,
    CLIENT_ERROR_CODE,
    MESSAGE_TYPE,
    Artifact,
    Kind,
    RecordDict,
    Request,
    decode_reply,
    decode_terms,
    encode_reply,
    question_hash,
    reply_artifacts,
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
        _open(ledger, site, policy, terms)
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
    # Before a seed model is loaded that the server names.
    asking = Terms(touching(terms.settings), terms.seed, terms.public)
    check_terms(policy, asking, first_terms(site.audit, ledger.entries()))
    introduces = kind == "profile" and terms.only_introduces(site.client)
    said = [terms.settings.model_dump(mode="json"), terms.seed, terms.public, list(terms.experts), introduces]
    outbox, asked = Outbox.of_run(site, run), question_hash(said, content)
    spent = [] if introduces else planned_spending(kind, terms.settings)
    once = not introduces and _answers_once(kind, policy, spent)
    ever = _asked_ever(kind, terms.settings, content, site) if once else None
    released = {digest_of(e.arrays): e for e in ledger.run(run) if isinstance(e, Intent) and e.stage == kind}
    answer = outbox.kept(kind, asked)
    if answer is None and ever and (kept := Outbox.of_all_runs(site, ever).kept(kind, ever)):
        answer = Answer(kept.arrays, _for_the_audit(kind, terms, ledger))
    # Lost from the outbox it may be computed anew, if it comes to the same; noise never would.
    if answer is None and released and not spent and not outbox.holds(kind):
        answer = Answer(
            decode_reply(respond(content), _artifacts(kind, terms, site, policy)), _for_the_audit(kind, terms, ledger)
        )
    if answer and (first := released.get(digest_of(array_entries(answer.arrays | answer.audit)))):
        others = [entry for entry in ledger.run(run) if entry not in released.values()]
        check_request(policy, terms.settings, [array.name for array in first.arrays], others)
        ledger.append(Resent(run=run, message=message, stage=kind, first=first.message))
        return encode_reply(answer.arrays, answer.audit)
    ready = array_entries(answer.arrays) if answer else []
    arrays = _checked(
        kind, terms, site, policy, ledger, spent, ready, lambda: encode_reply(answer.arrays) if answer else respond(content)
    )
    if kind == "profile" and arrays["client"] != site.client:
        raise PolicyError(f"this is client {site.client}, but the reply says {arrays['client']}")
    extra = _for_the_audit(kind, terms, ledger)
    outbox.keep(kind, asked, Answer(arrays, extra))
    if ever:
        Outbox.of_all_runs(site, ever).keep(kind, ever, Answer(arrays, {}))
    keep_settings(site.audit, terms.settings)
    ledger.append(Intent(run=run, message=message, stage=kind, arrays=array_entries(arrays | extra), spent=spent))
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


def planned_spending(kind: Kind, settings: Settings) -> list[Spent]:
    """The differential privacy that a reply spends, as its settings say before it is computed."""
    privacy = settings.privacy
    names = [artifact.name for artifact in reply_artifacts(kind, settings, load_seed(settings.seed_model))]
    if kind == "profile" and privacy.vectors == "gaussian":
        mechanism, spent = vectors_mechanism(settings), (privacy.epsilon, privacy.delta)
        covered = [name for name in names if name != "client"]
    elif kind == "expert" and privacy.expert == "dp-sgd":
        mechanism, spent = expert_mechanism(settings), (privacy.expert_epsilon, privacy.expert_delta)
        covered = names
    else:
        return []
    if not covered:
        return []
    return [Spent(covers=covered, epsilon=spent[0], delta=spent[1], **asdict(mechanism))]


def kind_of(message_type: str) -> Kind:
    """Which of our questions a Flower message type is.

    Raises:
        ProtocolError: none.
    """
    kinds: list[Kind] = [kind for kind, name in MESSAGE_TYPE.items() if name == message_type]
    if not kinds:
        raise ProtocolError(f"message type {message_type!r} is none of {', '.join(MESSAGE_TYPE.values())}")
    return kinds[0]


def _checked(
    kind: Kind,
    terms: Request,
    site: Site,
    policy: Policy,
    ledger: Ledger,
    spent: list[Spent],
    ready: list[ArrayEntry],
    compute: Callable[[], RecordDict],
) -> dict[str, np.ndarray]:
    """The arrays of the reply, computed only if they may be asked for, and returned only if they may leave; ``ready`` are they
    where they are kept from before.
    """
    settings, run = terms.settings, terms.envelope.run
    artifacts = _artifacts(kind, terms, site, policy)
    names = [artifact.name for artifact in (*artifacts, *AUDIT_ARTIFACTS[kind])]
    entries = ledger.run(run)
    check_request(policy, settings, names, entries)
    ever = ledger.entries()
    check_budget(policy, spent, names, ever)
    check_statistics(policy, names, spent, ever, ready)
    arrays = decode_reply(compute(), artifacts)
    check_arrays(policy, arrays, [array for entry in entries if isinstance(entry, Intent) for array in entry.arrays])
    return arrays


def _artifacts(kind: Kind, terms: Request, site: Site, policy: Policy) -> list[Artifact]:
    seed, introduced = load_seed(terms.settings.seed_model), terms.only_introduces(site.client)
    return permitted(policy, reply_artifacts(kind, terms.settings, seed, introduced))


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


def _open(ledger: Ledger, site: Site, policy: Policy, terms: Request) -> None:
    """Begin the run in the ledger, keep the policy it runs under, and write down what the server has signed for."""
    envelope, digest = terms.envelope, policy_hash(policy)
    if policy.server not in (None, envelope.key):
        raise PolicyError(
            f"the server's ledger has the key {envelope.key[:16]}, but this client's policy allows {policy.server[:16]} alone"
        )
    stored = site.audit / f"policy-{digest}.toml"
    if not stored.exists():
        write_atomically(stored, policy_text(policy))
    opened = Open(
        run=envelope.run,
        role="client",
        key=ledger.public,
        server=envelope.key,
        settings=settings_hash(terms.settings),
        seed_model=terms.seed,
        public_set=terms.public,
        code=code_hash(),
        policy=digest,
    )
    ledger.open(opened)
    known = ledger.run(envelope.run)
    begun = next(entry for entry in known if isinstance(entry, Open))
    for what in ("server", "settings", "seed_model", "public_set"):
        if getattr(begun, what) != getattr(opened, what):
            raise ProtocolError(f"run {envelope.run[:8]} began with another {what}; a run keeps what it began with")
    if new := [receipt for receipt in envelope.receipts if receipt not in known]:
        _check_receipts(envelope.run, known, new)
        ledger.append(*new)


def _check_receipts(run: str, known: list[Entry], receipts: list[Receipt]) -> None:
    server = next(entry.server for entry in known if isinstance(entry, Open))
    for receipt in receipts:
        statement = receipt_statement(receipt.run, receipt.message, receipt.arrays)
        if receipt.run != run or not signed_by(server, receipt.signature, statement):
            raise ProtocolError(f"the receipt for message {receipt.message} is not signed by the server of this run")


@contextmanager
def padded(site: Site) -> Iterator[None]:
    """Let the block end only at a multiple of the policy's time step after it began."""
    begin = time.monotonic()
    yield
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
