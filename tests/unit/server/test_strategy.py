"""The strategy's waiting, over a grid that a test plays."""

from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict

from metamoe.common.config import Settings
from metamoe.common.errors import RunFailedError
from metamoe.common.presets import validated
from metamoe.common.wire import CLIENT_ERROR_CODE, encode_reply
from metamoe.server import strategy
from metamoe.server.strategy import MetaMoE


class Grid:
    """Answers each message with the next of what its node has to say; who is online goes by a list too."""

    def __init__(self, answers: dict[int, list[Error | RecordDict]], online: list[set[int]]) -> None:
        self.answers, self.online, self.pushed = answers, online, list[int]()

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str) -> Message:
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id)

    def push_messages(self, messages: list[Message]) -> list[str]:
        self.messages = {f"{len(self.pushed)}-{k}": message for k, message in enumerate(messages)}
        self.pushed += [message.metadata.dst_node_id for message in messages]
        return list(self.messages)

    def pull_messages(self, ids: list[str]) -> list[Message]:
        replies = []
        for number in ids:
            message = self.messages[number]
            reply = Message(self.answers[message.metadata.dst_node_id].pop(0), reply_to=message)
            reply.metadata.__dict__["_reply_to_message_id"] = number
            replies.append(reply)
        return replies

    def get_node_ids(self) -> set[int]:
        return self.online.pop(0) if len(self.online) > 1 else self.online[0]


FINE = encode_reply({})
GONE = Error(5, "Node unavailable")


def waiting(rejoin: float, clients: int = 2, quorum: int = 0) -> Settings:
    compute = {"rejoin-timeout": rejoin, "connect-timeout": 0.01}
    return validated({"clients": clients, "quorum": quorum, "compute": compute, "router": {"top-k": 1, "renormalise": False}})


def asked(grid: Grid, settings: Settings) -> dict[int, object]:
    return dict(MetaMoE(settings, Path())._ask(grid, "profile", {1: RecordDict(), 2: RecordDict()}))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "_POLL_SECONDS", 0.001)


@pytest.mark.usefixtures("identity")
def test_a_node_that_dropped_out_is_asked_again_when_it_is_back() -> None:
    grid = Grid({1: [FINE], 2: [GONE, Error(8, "crashed"), FINE]}, [{1}, {1}, {1, 2}])
    replies = asked(grid, waiting(60))
    assert all(isinstance(reply, RecordDict) for reply in replies.values())
    assert grid.pushed == [1, 2, 2, 2]


@pytest.mark.usefixtures("identity")
def test_nobody_waits_for_longer_than_the_settings_say_nor_for_a_refusal() -> None:
    replies = asked(Grid({1: [FINE], 2: [GONE]}, [{1}]), waiting(0.05))
    assert isinstance(replies[2], RunFailedError)
    grid = Grid({1: [FINE], 2: [GONE]}, [{1, 2}])
    assert isinstance(asked(grid, waiting(0))[2], RunFailedError)
    assert grid.pushed == [1, 2]
    grid = Grid({1: [FINE], 2: [Error(CLIENT_ERROR_CODE + 60, "")]}, [{1, 2}])
    assert "PolicyError" in str(asked(grid, waiting(60))[2])
    assert grid.pushed == [1, 2]


def test_a_run_begins_with_the_quorum_if_the_others_do_not_connect() -> None:
    assert MetaMoE(waiting(0, clients=3, quorum=2), Path())._nodes(Grid({}, [{2, 1}])) == [1, 2]
    with pytest.raises(RunFailedError, match="only 2 clients are connected"):
        MetaMoE(waiting(0, clients=3), Path())._nodes(Grid({}, [{2, 1}]))


@pytest.mark.usefixtures("identity")
def test_many_clients_are_asked_a_hundred_at_a_time() -> None:
    class Counting(Grid):
        waiting, most = 0, 0

        def push_messages(self, messages: list[Message]) -> list[str]:
            self.waiting += len(messages)
            self.most = max(self.most, self.waiting)
            return super().push_messages(messages)

        def pull_messages(self, ids: list[str]) -> list[Message]:
            self.waiting -= len(ids)
            return super().pull_messages(ids)

    grid = Counting({node: [FINE] for node in range(1, 251)}, [set()])
    requests = {node: RecordDict() for node in range(1, 251)}
    replies = dict(MetaMoE(waiting(0, clients=250), Path())._ask(grid, "profile", requests))
    assert set(replies) == set(requests)
    assert grid.pushed == list(requests)
    assert grid.most == 100
