"""The method, top to bottom: three stages over any way to ask the clients."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from common.compute import threads
from common.config import Settings
from common.data.datasets import check_domains, known_classes, load_public, public_fingerprint
from common.events import EventLog
from common.files import write_json
from common.model.artifact import router_arrays, save_model
from common.model.seed import load_seed
from server.exchange import Ask, Exchange
from server.experts import store_expert, stored_expert
from server.proxies import public_features, select_proxies, selection_record
from server.unify import unify


def run_stages(settings: Settings, nodes: Sequence[int], ask: Ask, out: Path) -> None:
    """Turn the clients' experts into one model.

    Writes ``proxies.json``, ``server/experts/``, ``model/`` and, last, ``server/summary.json`` under the run folder, and
    events to ``events.jsonl`` on the way.

    Args:
        settings: of the run.
        nodes: the clients' addresses, in any order.
        ask: how to reach them.
        out: the run folder.

    Raises:
        MetaMoEError: one of its kinds, see :class:`server.exchange.Exchange`.
    """
    events, names = EventLog(out / "events.jsonl"), settings.client_names
    timings: dict[str, float] = {}
    check_domains(settings.data)
    with threads(settings.compute.server_threads):
        with _timed(timings, "prepare"):
            seed, public = load_seed(settings.seed_model), load_public(settings.data)
            public_hash = public_fingerprint(settings.data)
            exchange = Exchange(settings, seed, public_hash, nodes, ask, events)

        # 1. Every client sends the mean of the seed's embedding over its private samples.
        with _timed(timings, "profile"):
            routing_vectors = exchange.profiles()

        # 2. For each client, the server picks proxies out of the public set.
        with _timed(timings, "embed"):
            features = public_features(seed, public, public_hash, partial(events, "embed"))
        with _timed(timings, "select"):
            events("select", 0, 1)
            selections = select_proxies(features, routing_vectors, settings.proxies)
            by_client = {name: selection_record(s) for name, s in zip(names, selections, strict=True)}
            write_json(out / "proxies.json", {"public": public_hash, "clients": by_client})
            events("select", 1, 1)

        # 3. Every client trains its expert on private samples and proxies; what it sends is on disk before the next one is
        # read.
        folders = [out / "server" / "experts" / name for name in names]
        with _timed(timings, "expert"):
            requests = [exchange.request({"proxies": s.ids}) for s in selections]
            for client, arrays in exchange.ask("expert", requests):
                store_expert(folders[client], seed, settings.lora, arrays)

        # 4. The experts become one model, whose router learns from the proxies.
        with _timed(timings, "unify"):
            experts, vectors = zip(*map(stored_expert, folders), strict=True)
            proxies = [public.select(s.ids) for s in selections]
            weights = unify(seed, settings, public, proxies, experts, vectors, partial(events, "unify"))
            manifest = save_model(out / "model", seed, settings, names, known_classes(settings.data), weights)

        # 5. The model goes back to every client, who evaluates it where the data is.
        with _timed(timings, "deliver"):
            matrices = {
                f"expert.{k}.{name}": m.numpy() for k, expert in enumerate(weights.experts) for name, m in expert.items()
            }
            routers = {f"router.{name}": array for name, array in router_arrays(weights.routers).items()}
            delivery = exchange.request(routers | matrices)
            reported = {names[k]: arrays for k, arrays in exchange.ask("deliver", [delivery] * len(names))}

    summary = {
        "model": manifest.model_hash,
        "clients": [asdict(transfer) for transfer in exchange.transfers],
        "timings": {stage: round(seconds, 3) for stage, seconds in timings.items()},
        "reported": {name: float(arrays["accuracy"]) for name, arrays in reported.items() if "accuracy" in arrays},
    }
    write_json(out / "server" / "summary.json", summary)


@contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    timings[stage] = time.monotonic() - started
