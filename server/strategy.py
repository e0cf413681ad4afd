"""The Flower strategy: the three stages over Flower's grid."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from metamoe.common.config import Settings
from metamoe.common.errors import MetaMoEError, RunFailedError, by_code
from metamoe.common.wire import CLIENT_ERROR_CODE, MESSAGE_TYPE, Kind
from metamoe.server.exchange import Waiting
from metamoe.server.stages import run_stages

_POLL_SECONDS = 0.2
_COHORT = 100
"""Nodes with a request at a time: Flower's link state looks through all messages for each node, which is quadratic."""
_DROPPED_OUT = (0, 3, 4, 5, 8)
"""Flower's error codes of a node or message that is not there, and of a process that ended without an answer. What our apps
raise has another.
"""
_NOT_THERE = 5
_ATTEMPTS = 3
"""How often a node is asked the same that is there all the time, but whose process ends."""


class MetaMoE(Strategy):
    """Turns experts trained apart into one Mixture-of-Experts (Jiang et al. 2026).

    Its stages are not rounds of train and evaluate, so ``start`` is replaced as a whole and Flower's four hooks have
    nothing to do.

    Args:
        settings: of the run.
        out: the run folder.
        audit_keys: folder of the key that signs the server's ledger; None for one of this run alone.
    """

    def __init__(self, settings: Settings, out: Path, audit_keys: Path | None = None) -> None:
        self.settings, self.out, self.audit_keys = settings, out, audit_keys

    def start(self, grid: Grid) -> None:  # type: ignore[override]
        """Run the stages; see :func:`metamoe.server.stages.run_stages` for what is written and raised."""
        nodes = self._nodes(grid)
        run_stages(self.settings, nodes, lambda kind, requests: self._ask(grid, kind, requests), self.out, self.audit_keys)

    def _nodes(self, grid: Grid) -> list[int]:
        """Wait until as many clients are connected as the settings say, or in the end for the quorum."""
        remedy = (
            f"the settings say clients = {self.settings.clients}: change one or the other (flwr run . "
            f"--federation-config num-supernodes={self.settings.clients}), or raise compute.connect-timeout"
        )
        wanted, deadline = self.settings.clients, time.monotonic() + self.settings.compute.connect_timeout
        while len(nodes := sorted(grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                if len(nodes) >= self.settings.least_clients:
                    break
                raise RunFailedError(f"only {len(nodes)} clients are connected; {remedy}")
            time.sleep(_POLL_SECONDS)
        if len(nodes) > wanted:
            raise RunFailedError(f"{len(nodes)} clients are connected; {remedy}")
        return nodes

    def _ask(
        self, grid: Grid, kind: Kind, requests: Mapping[int, RecordDict]
    ) -> Iterator[tuple[int, RecordDict | MetaMoEError | Waiting]]:
        compute = self.settings.compute
        waiting, deadline, queue = dict[str, int](), time.monotonic() + compute.timeout, list(requests)
        # Nodes that dropped out and may come back, and until when.
        dropped, rejoin_by = dict[int, MetaMoEError](), dict[int, float]()
        attempts = Counter[int]()
        while (queue or waiting or dropped) and time.monotonic() < deadline:
            room = max(0, _COHORT - len(waiting))
            cohort, queue = queue[:room], queue[room:]
            waiting |= _push(grid, kind, {node: requests[node] for node in cohort}) if cohort else {}
            for reply in grid.pull_messages(list(waiting)) if waiting else ():
                # By the message it answers: a node that died has no source of its own.
                node = waiting.pop(reply.metadata.reply_to_message_id)
                if not reply.has_error():
                    yield node, reply.content
                elif compute.rejoin_timeout and reply.error.code in _DROPPED_OUT and attempts[node] < _ATTEMPTS:
                    dropped[node] = _failure(reply)
                    rejoin_by.setdefault(node, time.monotonic() + compute.rejoin_timeout)
                    attempts[node] += reply.error.code != _NOT_THERE
                    yield node, Waiting(str(dropped[node]))
                else:
                    yield node, _failure(reply)
            online = set(grid.get_node_ids()) if dropped else set()
            for node in list(dropped):
                if time.monotonic() > rejoin_by[node]:
                    yield node, dropped.pop(node)
                elif node in online:
                    del dropped[node]
                    waiting |= _push(grid, kind, {node: requests[node]})
            time.sleep(_POLL_SECONDS)
        yield from dropped.items()

    def summary(self) -> None:
        """Nothing to log: the settings lie in the run folder."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Not a stage of this method."""
        return []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not a stage of this method."""
        return None, None

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Not a stage of this method."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Not a stage of this method."""
        return None


def _push(grid: Grid, kind: Kind, requests: Mapping[int, RecordDict]) -> dict[str, int]:
    """Send each node its request; the nodes by the message that they are to answer."""
    messages = [
        grid.create_message(content=content, message_type=MESSAGE_TYPE[kind], dst_node_id=node, group_id=kind)
        for node, content in requests.items()
    ]
    return dict(zip(grid.push_messages(messages), requests, strict=True))


def _failure(reply: Message) -> MetaMoEError:
    """What a client's bare error code, or Flower's own, says."""
    code = reply.error.code
    if code >= CLIENT_ERROR_CODE:
        kind = by_code(code - CLIENT_ERROR_CODE)
        summary = (kind.__doc__ or kind.__name__).strip().splitlines()[0]
        return kind(f"{kind.__name__}: {summary} The reason is in the client's own log, client-N.log in its folder.")
    return RunFailedError(f"Flower reports error {code}: {(reply.error.reason or 'no reason given').strip()}")
