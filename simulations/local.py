"""The same run in this one process, without Flower's processes and without Ray: for tests and debugging."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.config import Settings
from metamoe.common.errors import MetaMoEError
from metamoe.common.wire import Kind, RecordDict
from metamoe.server.stages import run_stages


def run_local(settings: Settings, out: Path) -> None:
    """Run all stages with the clients answering one after the other; what is written and computed equals a Flower run's."""

    def ask(kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict | MetaMoEError]]:
        for client, content in requests.items():
            site = Site(client, out / "clients")
            try:
                yield client, audited(kind, content, site, partial(respond, kind, site=site))
            except MetaMoEError as error:
                yield client, error

    run_stages(settings, settings.members, ask, out)
