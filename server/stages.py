"""The method, top to bottom: three stages over any way to ask the clients."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from metamoe.common.audit.keys import audit_key
from metamoe.common.audit.ledger import Ledger
from metamoe.common.compute import device_of, precision_of, threads
from metamoe.common.config import Settings
from metamoe.common.data.datasets import check_domains, known_classes, load_public, public_fingerprint
from metamoe.common.data.tasks import check_seed
from metamoe.common.events import EventLog
from metamoe.common.files import write_json
from metamoe.common.model.artifact import router_arrays, save_model
from metamoe.common.model.seed import load_seed
from metamoe.common.model.vectors import all_evidence_paths
from metamoe.server.embedding import public_features
from metamoe.server.exchange import Ask, Exchange
from metamoe.server.experts import store_expert, stored_expert, stored_vectors
from metamoe.server.merging import Contribution, merge
from metamoe.server.proxies import select_proxies, selection_record
from metamoe.server.unify import initial_routers, router_samples, unify


def run_stages(settings: Settings, nodes: Sequence[int], ask: Ask, out: Path, audit_keys: Path | None = None) -> None:
    """Turn the clients' experts into one model.

    Writes ``proxies.json``, ``server/experts/``, ``model/`` and, last, ``server/summary.json`` under the run folder, and
    events to ``events.jsonl`` on the way.

    Args:
        settings: of the run.
        nodes: the clients' addresses, in any order.
        ask: how to reach them.
        out: the run folder.
        audit_keys: folder of the key that signs the server's ledger; None for one of this run alone.

    Raises:
        MetaMoEError: one of its kinds, see :class:`metamoe.server.exchange.Exchange`.
    """
    events, names = EventLog(out / "events.jsonl"), settings.client_names
    timings: dict[str, Timing] = {}
    check_domains(settings.data)
    device = device_of(settings.compute.server_device)
    with threads(settings.compute.server_threads), precision_of(settings.compute.precision, device):
        with _timed(timings, "prepare"):
            seed, public = load_seed(settings.seed_model), load_public(settings.data)
            check_seed(seed, settings.data)
            seed.model.to(device)
            public_hash = public_fingerprint(settings.data)
            ledger = Ledger(out / "server" / "audit", audit_key(audit_keys) if audit_keys else None)
            exchange = Exchange(settings, seed, public_hash, nodes, ask, events, ledger)

        # 1. Every client sends means of what the frozen seed makes of its private samples.
        with _timed(timings, "profile"):
            profiles = exchange.profiles()

        # 2. For each client, the server picks proxies out of the public set.
        with _timed(timings, "embed"):
            router = settings.router
            compared = router.rows == "fisher" or router.seed_expert
            paths = all_evidence_paths(seed, settings.lora, router) if compared else []
            features = public_features(seed, settings.data, paths, public, public_hash, partial(events, "embed"))
        with _timed(timings, "select"):
            events("select", 0, len(profiles))
            selections = select_proxies(features[:, -1], profiles, settings, partial(events, "select"))
            by_client = {names[k]: selection_record(s) for k, s in selections.items()}
            write_json(out / "proxies.json", {"public": public_hash, "clients": by_client})

        # 3. Every client trains its expert on private samples and proxies; what it sends is on disk before the next one is
        # read.
        folders = {k: out / "server" / "experts" / names[k] for k in selections}
        with _timed(timings, "expert"):
            requests = {k: exchange.request({"proxies": s.ids}) for k, s in selections.items()}
            for client, arrays in exchange.ask("expert", requests):
                store_expert(folders[client], seed, settings.lora, arrays)

        # 4. The experts become one model, whose router learns from the proxies.
        with _timed(timings, "unify"):
            members = exchange.members
            sent = [
                Contribution(
                    names[k], folders[k], profiles[k].get("seed-ffn-inputs", stored_vectors(folders[k])), selections[k]
                )
                for k in members
            ]
            parts, merged = merge(sent, settings, seed, features)
            experts = [stored_expert(part.folder)[0] for part in parts]
            vectors, proxies = [part.vectors for part in parts], [public.select(part.selection.ids) for part in parts]
            scores = [part.selection.scores for part in parts]
            routers = initial_routers(seed, settings, features[:, :-1], proxies, scores, experts, vectors)
            samples = router_samples(settings, public, proxies)
            weights = unify(seed, settings, experts, routers, samples, partial(events, "unify"))
            present = [part.name for part in parts]
            manifest = save_model(out / "model", seed, settings, present, known_classes(settings.data), weights)

        # 5. The model goes back to every client, who evaluates it where the data is.
        with _timed(timings, "deliver"):
            matrices = {
                f"expert.{k}.{name}": m.numpy() for k, expert in enumerate(weights.experts) for name, m in expert.items()
            }
            arrays = {f"router.{name}": array for name, array in router_arrays(weights.routers).items()}
            delivery = exchange.request(arrays | matrices, present)
            reported = {names[k]: reply for k, reply in exchange.ask("deliver", dict.fromkeys(members, delivery))}
            exchange.close()

    summary = {
        "model": manifest.model_hash,
        "clients": [asdict(transfer) for transfer in exchange.transfers],
        "missing": [asdict(missing) for missing in exchange.missing],
        "merged": merged,
        "timings": {stage: round(timing.wall, 3) for stage, timing in timings.items()},
        "cpu_seconds": {stage: round(timing.cpu, 3) for stage, timing in timings.items()},
        "reported": {name: float(reply["accuracy"]) for name, reply in reported.items() if "accuracy" in reply},
    }
    write_json(out / "server" / "summary.json", summary)


@dataclass(frozen=True)
class Timing:
    """Seconds on the clock, and seconds of this process on any core."""

    wall: float
    cpu: float


@contextmanager
def _timed(timings: dict[str, Timing], stage: str) -> Iterator[None]:
    wall, cpu = time.monotonic(), time.process_time()
    yield
    timings[stage] = Timing(time.monotonic() - wall, time.process_time() - cpu)
