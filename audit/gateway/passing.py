"""What of a client's replies passes: the same rules as in the client's own app, with a ledger that the app cannot reach."""

from collections.abc import Callable, Set
from math import ceil
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from metamoe.audit.gateway.objects import read_reply
from metamoe.common.audit.entries import Intent, Refusal, array_entries, seal_statement
from metamoe.common.audit.keys import CLIENT_KEY, read_public, signed_by
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import Policy, load_policy
from metamoe.common.audit.release import (
    allowed_artifacts,
    check_asked,
    checked,
    is_sent_again,
    open_run,
    planned_spending,
)
from metamoe.common.audit.terms import keep_settings
from metamoe.common.errors import InputFileError, InvalidSettingError, PolicyError, ProtocolError
from metamoe.common.files import write_atomically
from metamoe.common.wire import (
    AUDIT_ARTIFACTS,
    Artifact,
    Kind,
    Request,
    decode_audit,
    decode_reply,
    decode_terms,
    encode_reply,
    framed_bytes,
)

_MOST_LINES = 1_000
_SLACK = 1_000
_MORE = 100_000


class Passing:
    """The owner's policy, and the gateway's own ledger.

    Args:
        folder: of the ledger.
        policy: the owner's policy file, read anew for every reply.
    """

    def __init__(self, folder: Path, policy: Path) -> None:
        self._folder, self._policy = folder, policy
        load_policy(policy)
        self._ledger = Ledger(folder)
        self._number = folder / "client-number"

    def room(self, kind: Kind, content: RecordDict) -> int:
        """The most bytes that the objects of a reply can have, with what Flower writes about them.

        Raises:
            MetaMoEError: there is no such request.
        """
        terms = self._opened(content)
        artifacts = [*self._artifacts(kind, terms, load_policy(self._policy)), *AUDIT_ARTIFACTS[kind]]
        return _MORE + sum(framed_bytes(artifact) + _SLACK for artifact in artifacts)

    def released(
        self, kind: Kind, content: RecordDict, root: str, objects: Set[str], content_of: Callable[[str], bytes]
    ) -> RecordDict:
        """A reply made anew of the arrays that were pushed, once it may leave and the ledger says that it will.

        Args:
            kind: what was asked.
            content: the request, without arrays.
            root: id of the object with the reply's records.
            objects: ids of all objects that were pushed.
            content_of: gives the content of an object that was pushed.

        Raises:
            ProtocolError: it is not what was declared.
            PolicyError, BudgetError: it may not leave.
            LedgerError: it could not be written down.
        """
        terms = self._opened(content)
        policy = load_policy(self._policy)
        check_asked(policy, self._folder, self._ledger, kind, terms, self._introduces(kind, terms))
        artifacts = self._artifacts(kind, terms, policy)
        records = read_reply(root, content_of, artifacts, AUDIT_ARTIFACTS[kind])
        arrays, audit = decode_reply(records, artifacts), decode_audit(kind, records)
        if kind == "profile" and not 0 <= arrays["client"] < terms.settings.clients:
            raise PolicyError(f"the reply says it is client {arrays['client']} of {terms.settings.clients}")
        self._check_audit(terms.envelope.run, audit)
        anew = encode_reply(arrays, audit)
        if set(get_all_nested_objects(anew)) != objects:
            raise ProtocolError("there are other objects than these records have, as Flower writes them")
        sent = array_entries(arrays | audit)
        if not is_sent_again(kind, terms, policy, self._ledger, sent):
            spent = [] if self._introduces(kind, terms) else planned_spending(kind, terms.settings)
            checked(kind, terms, artifacts, policy, self._ledger, spent, array_entries(arrays), lambda: arrays)
            keep_settings(self._folder, terms.settings)
            run, message = terms.envelope.run, terms.envelope.message
            self._ledger.append(Intent(run=run, message=message, stage=kind, arrays=sent, spent=spent))
            if kind == "deliver":
                self._ledger.seal(run)
        if kind == "profile":
            write_atomically(self._number, f"{arrays['client']}\n")
        return anew

    def refused(self, kind: Kind, content: RecordDict, code: int) -> None:
        """Write down that nothing leaves but an error's code; of a run without the client nothing, as in its own ledger.

        Raises:
            LedgerError: that cannot be written down.
        """
        if not self._takes_part(decode_terms(content)):
            return
        envelope = self._opened(content).envelope
        self._ledger.append(Refusal(run=envelope.run, message=envelope.message, stage=kind, code=code))

    def due(self, came: float, ready: float) -> float:
        """When a reply may leave whose request came at one time, and which was ready at another: after a whole number of the
        policy's time steps.
        """
        step = load_policy(self._policy).limits.reply_time_step
        return came + step * ceil((ready - came) / step) if step else ready

    def _artifacts(self, kind: Kind, terms: Request, policy: Policy) -> list[Artifact]:
        return allowed_artifacts(kind, terms.settings, policy, self._introduces(kind, terms))

    def _introduces(self, kind: Kind, terms: Request) -> bool:
        """Whether nothing but the client's number is asked for; which it has, its first profile has said."""
        return kind == "profile" and self._number.is_file() and terms.only_introduces(int(self._number.read_text()))

    def _takes_part(self, terms: Request) -> bool:
        return not self._number.is_file() or int(self._number.read_text()) in terms.settings.members

    def _opened(self, content: RecordDict) -> Request:
        terms = decode_terms(content)
        if not self._takes_part(terms):
            raise InvalidSettingError("the run is without this client (setting without), and so nothing of it leaves")
        open_run(self._ledger, self._folder, load_policy(self._policy), terms)
        return terms

    def _check_audit(self, run: str, audit: dict[str, np.ndarray]) -> None:
        """Whether what is said for the client's own ledger is its one key, and a root that this key has signed.

        Raises:
            ProtocolError: it is something else.
        """
        known = self._folder / CLIENT_KEY
        if "audit-key" in audit:
            key = audit["audit-key"].tobytes().hex()
            if not known.exists():
                write_atomically(known, key + "\n")
            if read_public(known) != key:
                raise ProtocolError(f"the reply names another key for the client's ledger than {known}")
        if "ledger-root" in audit:
            root, signature = (audit[name].tobytes().hex() for name in ("ledger-root", "ledger-signature"))
            try:
                key = read_public(known)
            except InputFileError as error:
                raise ProtocolError("the reply seals a ledger whose key it has not named") from error
            if not any(signed_by(key, signature, seal_statement(run, count, root)) for count in range(1, _MOST_LINES)):
                raise ProtocolError("the reply's seal is not signed by the key of the client's ledger")
