"""The method, top to bottom: three stages over any way to ask the clients, each a function of what lies in the run folder."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from metamoe.common.arrays import arrays_hash
from metamoe.common.audit.entries import settings_hash
from metamoe.common.audit.keys import audit_key
from metamoe.common.audit.ledger import Ledger
from metamoe.common.compute import place_of, threads
from metamoe.common.config import Settings
from metamoe.common.data.datasets import check_domains, known_classes, load_public, public_fingerprint
from metamoe.common.data.tasks import check_seed
from metamoe.common.events import EventLog
from metamoe.common.files import alone, disk_errors, write_json
from metamoe.common.model.artifact import MANIFEST, intact, read_weights, router_arrays, save_model
from metamoe.common.model.seed import seed_at
from metamoe.common.model.vectors import all_evidence_paths, evidence_of
from metamoe.server.embedding import public_features
from metamoe.server.exchange import Ask, Exchange
from metamoe.server.experts import stored_arrays, stored_expert
from metamoe.server.merging import Contribution, contribution, merge
from metamoe.server.proxies import kept_selections, read_selections, select_proxies, write_selections
from metamoe.server.state import RunState, clocks
from metamoe.server.unify import initial_routers, router_samples, unify


def run_stages(settings: Settings, nodes: Sequence[int], ask: Ask, out: Path, audit_keys: Path | None = None) -> None:
    """Turn the clients' experts into one model, from where the run folder says that the run is.

    Writes what :mod:`metamoe.server.state` says and, last, ``server/summary.json`` under the run folder, and events to
    ``events.jsonl`` on the way. A finished run is left as it is.

    Args:
        settings: of the run.
        nodes: the clients' addresses, in any order.
        ask: how to reach them.
        out: the run folder.
        audit_keys: folder of the key that signs the server's ledger; None for one of this run alone.

    Raises:
        StateFileError: the folder holds another run, or cannot be written.
        MetaMoEError: one of its kinds, see :class:`metamoe.server.exchange.Exchange`.
    """
    summary = out / "server" / "summary.json"
    names = settings.client_names
    check_domains(settings.data)
    place = place_of(settings.compute, "server")
    with (
        disk_errors(out),
        alone(out / "server"),
        threads(settings.compute.server_threads),
        place.computing(),
    ):
        if summary.is_file():
            return
        begun = clocks()
        events = EventLog(out / "events.jsonl")
        seed, public = seed_at(settings.seed_model, place), load_public(settings.data)
        check_seed(seed, settings.data)
        public_hash = public_fingerprint(settings.data)
        about = {"settings": settings_hash(settings), "seed": seed.fingerprint, "public": public_hash}
        state = RunState(out, settings, seed, about)
        ledger = Ledger(out / "server" / "audit", audit_key(audit_keys) if audit_keys else None)
        exchange = Exchange(settings, seed, public_hash, nodes, ask, events, ledger, state)
        state.took("prepare", begun)

        # 1. Every client sends means of what the frozen seed makes of its private samples.
        with state.timed("profile"):
            profiles = exchange.profiles()

        # 2. For each client, the server picks proxies out of the public set.
        with state.timed("embed"):
            router = settings.router
            compared = router.rows == "fisher" or router.seed_expert
            paths = all_evidence_paths(seed, settings.lora, router) if compared else []
            features = public_features(seed, settings.data, paths, public, public_hash, partial(events, "embed"))
        with state.timed("select"):
            chosen = out / "proxies.json"
            if not state.holds("select", chosen):
                events("select", 0, len(profiles))
                found = select_proxies(features, profiles, settings, partial(events, "select"))
                earlier = kept_selections(out)
                write_selections(chosen, public_hash, {names[k]: earlier.get(names[k], own) for k, own in found.items()})
                state.finished("select", chosen)
            selections = read_selections(chosen)

        # 3. Every client trains its expert on private samples and proxies; what it sends is on disk before the next one is
        # read.
        with state.timed("expert"):
            requests = {k: exchange.request({"proxies": selections[names[k]].ids}) for k in exchange.members}
            for _ in exchange.ask("expert", requests):
                pass

        # 4. The experts become one model, whose router is made of means and shapes, and may learn from the proxies.
        with state.timed("unify"):
            if not state.holds("unify", out / "model" / MANIFEST) or not intact(out / "model"):
                sent = [
                    contribution(names[k], state.expert_folder(names[k]), profiles[k], selections[names[k]], settings)
                    for k in exchange.members
                ]
                parts, merged = merge(sent, settings, seed, features)
                experts = [stored_expert(part.folder)[0] for part in parts]
                vectors, proxies = [part.vectors for part in parts], [public.select(part.selection.ids) for part in parts]
                scores, shapes = [part.selection.scores for part in parts], [part.shape for part in parts]
                evidence = evidence_of(features, router)
                routers = initial_routers(seed, settings, evidence, proxies, scores, experts, vectors, shapes)
                samples = router_samples(settings, public, proxies)
                kept = out / "server" / "training"
                weights = unify(seed, settings, experts, routers, samples, partial(events, "unify"), kept / _key(parts))
                save_model(out / "model", seed, settings, [part.name for part in parts], known_classes(settings.data), weights)
                state.finished("unify", out / "model" / MANIFEST, merged=merged)
                shutil.rmtree(kept, ignore_errors=True)
            manifest, weights = read_weights(out / "model")

        # 5. The model goes back to every client, who evaluates it where the data is.
        with state.timed("deliver"):
            matrices = {
                f"expert.{k}.{name}": m.numpy() for k, expert in enumerate(weights.experts) for name, m in expert.items()
            }
            arrays = {f"router.{name}": array for name, array in router_arrays(weights.routers).items()}
            delivery = exchange.request(arrays | matrices, manifest.experts)
            reported = {names[k]: reply for k, reply in exchange.ask("deliver", dict.fromkeys(exchange.members, delivery))}
            exchange.close()

        write_json(
            summary,
            {
                "model": manifest.model_hash,
                "clients": [asdict(exchange.transfers[client]) for client in settings.members],
                "mean_alone": [names[k] for k in profiles if settings.by_shape and "seed-shape" not in profiles[k]],
                "missing": [asdict(missing) for missing in exchange.missing],
                "merged": state.notes("unify")[-1]["merged"],
                "timings": state.times("wall"),
                "cpu_seconds": state.times("cpu"),
                "peak_memory": state.peak_memory(),
                "reported": {name: float(reply["accuracy"]) for name, reply in reported.items() if "accuracy" in reply},
            },
        )


def _key(parts: Sequence[Contribution]) -> str:
    """What decides the router's training, beside the settings: the experts, and the samples chosen for each."""
    made_of = [(part.name, arrays_hash(stored_arrays(part.folder)), part.selection.ids.tolist()) for part in parts]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
