"""Each method of a benchmark as a model that can be asked, and what it reached; models are made once, and kept in the cache."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from metamoe.client.app import respond
from metamoe.client.site import Site
from metamoe.common.compute import place_of
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.data.datasets import load_private, load_public
from metamoe.common.data.metrics import accuracy, answered
from metamoe.common.events import EventLog
from metamoe.common.files import cache_folder, replaced_folder, write_json
from metamoe.common.model.artifact import Loaded, load_model, save_model
from metamoe.common.model.batch import Scores
from metamoe.common.model.lora import Expert, load_adapter, save_adapter, with_lora
from metamoe.common.model.seed import Seed, load_seed, seed_at
from metamoe.common.wire import Kind, RecordDict, encode_reply
from metamoe.server.stages import run_stages
from metamoe.server.unify import router_samples, unify
from metamoe.simulations.benchmark.fedavg import federated_average
from metamoe.simulations.benchmark.methods import Method
from metamoe.simulations.evaluate import (
    PUBLIC,
    answers_and_routing,
    dense,
    domains_of,
    ensemble,
    own_share,
    soup,
    test_sets,
)

# Raise it whenever a change of code changes numbers: what was worked out before is then worked out again.
_CODE = 2
_POOLED = {
    "samples": "proxies",
    "supervision": "both",
    "train_router": True,
    "train_experts": True,
    "epochs": 5,
    "learning_rate": 1e-3,
}
_FEDAVG_LOCAL_EPOCHS = 2
_LABEL_BYTES = 8


@dataclass(frozen=True)
class Outcome:
    """What one method reached with one seed; see :class:`metamoe.simulations.benchmark.tables.Record`."""

    domains: dict[str, float]
    right: dict[str, str]
    public: float
    own_expert_share: float | None
    bytes_up: float
    bytes_down: float
    unify_seconds: float | None
    inference_ms: float
    routing: dict[str, list[list[float]]] | None
    expert_names: list[str]
    sent: dict[str, list[dict[str, Any]]]
    seconds: float


@dataclass(frozen=True)
class Model:
    """A method ready to answer: for each domain and the public samples how, and what it took to get there."""

    scores: Mapping[str, Scores]
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    unify_seconds: float | None = None
    unified: Loaded | None = None
    sent: Mapping[str, list[dict[str, Any]]] | None = None
    merged: Mapping[str, list[str]] = field(default_factory=dict)


def build(method: Method, settings: Settings) -> Model:
    """Everything up to a model that can be asked, on the server's device."""
    place = place_of(settings.compute, "server")
    seed = seed_at(settings.seed_model, place)
    everywhere = [*settings.data.domains, PUBLIC]
    if method.use == "seed":
        return Model(dict.fromkeys(everywhere, dense(seed.model)))
    if method.use == "fedavg":
        return _fedavg(seed, settings, everywhere)
    folder = _run(settings)
    summary = json.loads((folder / "server" / "summary.json").read_text())
    clients = summary["clients"]
    up, down = (float(np.mean([client[key] for client in clients])) for key in ("bytes_up", "bytes_down"))
    experts = [load_adapter(folder / "server" / "experts" / name) for name in settings.client_names]
    alone = [dense(with_lora(seed, settings.lora, expert)) for expert in experts]
    match method.use:
        case "expert":
            # It is where it was trained, and nothing is sent.
            return Model(dict.fromkeys(everywhere, alone[method.client]))
        case "oracle":
            own = {d: [s for k, s in enumerate(alone) if settings.client_domain(k) == d] for d in settings.data.domains}
            # Of a domain without a client there is no expert, and the seed is all there is.
            best = {d: ensemble(members) if members else dense(seed.model) for d, members in own.items()}
            return Model(best | {PUBLIC: dense(seed.model)}, up, down)
        case "ensemble":
            return Model(dict.fromkeys(everywhere, ensemble(alone)), up, down)
        case "soup":
            merged, lora = soup(experts, settings.lora)
            return Model(dict.fromkeys(everywhere, dense(with_lora(seed, lora, merged))), up, down)
        case "pooled":
            return _pooled(seed, settings, folder, experts, down, everywhere)
        case _:
            unified = load_model(folder / "model", place)
            sent = {client["name"]: client["artifacts"] for client in clients}
            spent = summary["cpu_seconds"]["unify"]
            scores = dict.fromkeys(everywhere, unified.model.scores)
            return Model(scores, up, down, spent, unified, sent, summary["merged"])


def _run(settings: Settings) -> Path:
    """The run folder of these settings, after running the stages if that was not done before.

    Clients answer in this process. Runs, and what clients keep, their experts above all, lie in the cache by what made them, so
    that an expert is trained once, whatever the table.
    """
    folder = _cache("runs") / training_key(settings)
    state = _cache("clients")

    def ask(kind: Kind, requests: Mapping[int, RecordDict]) -> Iterator[tuple[int, RecordDict]]:
        for client, content in requests.items():
            # The delivered model is evaluated below, with all others.
            yield client, encode_reply({}) if kind == "deliver" else respond(kind, content, Site(client, state))

    # Several methods use the same run: the first to come here does it.
    with FileLock(f"{folder}.lock"):
        if not (folder / "server" / "summary.json").is_file():
            run_stages(settings, range(settings.clients), ask, folder)
    return folder


def _pooled(
    seed: Seed, settings: Settings, folder: Path, experts: Sequence[Expert], down: float, everywhere: Sequence[str]
) -> Model:
    """Experts and router trained on what no server may see: all private samples in one place."""
    place = place_of(settings.compute, "server")
    private = [load_private(settings, client, "train") for client in range(settings.clients)]
    target, times = folder / "pooled", folder / "pooled.json"
    with FileLock(f"{target}.lock"):
        if not times.is_file():
            routers = [router.weights() for router in load_model(folder / "model", place).model.routers]
            trained = settings.model_copy(update={"router_training": settings.router_training.model_copy(update=_POOLED)})
            samples = router_samples(trained, load_public(settings.data), private)
            started = time.process_time()
            weights = unify(seed, trained, experts, routers, samples, unwatched)
            spent = time.process_time() - started
            save_model(target, seed, settings, settings.client_names, [], weights)
            write_json(times, {"cpu_seconds": round(spent, 3)})
    unified = load_model(target, place)
    up = float(np.mean([len(data) * (_sample_bytes(data[0]) + _LABEL_BYTES) for data in private]))
    seconds = json.loads(times.read_text())["cpu_seconds"]
    return Model(dict.fromkeys(everywhere, unified.model.scores), up, down, seconds, unified)


def _sample_bytes(sample: Mapping[str, Any]) -> int:
    """What a private sample would weigh if it were sent as it is: pixels, or text."""
    if "image" in sample:
        return np.asarray(sample["image"]).nbytes
    return len("".join([sample["prompt"], *sample["choices"]]).encode())


def _fedavg(seed: Seed, settings: Settings, everywhere: Sequence[str]) -> Model:
    rounds = max(1, settings.expert_training.epochs // _FEDAVG_LOCAL_EPOCHS)
    target = _cache("fedavg") / training_key(settings)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            private = [load_private(settings, client, "train") for client in range(settings.clients)]
            kept = target.with_suffix(".round")
            told = partial(EventLog(target.with_suffix(".jsonl")), "fedavg")
            expert = federated_average(seed, settings, private, load_public(settings.data), rounds, kept, told)
            with replaced_folder(target) as new:
                save_adapter(new, seed, settings.lora, expert)
            kept.unlink()
    expert = load_adapter(target)
    scores = dense(with_lora(seed, settings.lora, expert))
    # Clients send float16, as experts do; what comes back is the mean, in float32.
    numbers = float(rounds * sum(tensor.numel() for tensor in expert.values()))
    return Model(dict.fromkeys(everywhere, scores), 2 * numbers + rounds * _LABEL_BYTES, 4 * numbers)


def outcome_of(settings: Settings, model: Model) -> Outcome:
    sets = test_sets(settings.seed_model, place_of(settings.compute, "server"), settings.data)
    domains: dict[str, float] = {}
    right: dict[str, str] = {}
    seconds = count = 0.0
    # The first batch pays for what is set up once.
    model.scores[sets[0].domain](sets[0].samples.asked(torch.arange(4)))
    routing: dict[str, list[list[float]]] = {}
    for test in sets[:-1]:
        started = time.process_time()
        if model.unified is not None:
            found, routing[test.name] = answers_and_routing(model.unified.model, test.samples)
        else:
            found = answered(model.scores[test.domain], test.samples)
        hits = found.chosen.eq(test.samples.answers).int().tolist()
        right[test.name] = "".join(map(str, hits))
        domains[test.name] = round(100.0 * sum(hits) / len(hits), 3)
        seconds, count = seconds + time.process_time() - started, count + len(test.samples.answers)
    names = model.unified.manifest.expert_names if model.unified is not None else []
    owners = [domains_of(settings, name, model.merged) for name in names]
    own = [own_share(owners, test, routing[test.name]) for test in sets[:-1] if any(test.domain in some for some in owners)]
    return Outcome(
        domains=domains,
        right=right,
        public=round(accuracy(model.scores[PUBLIC], sets[-1].samples), 3),
        own_expert_share=round(float(np.mean(own)), 4) if own else None,
        bytes_up=model.bytes_up,
        bytes_down=model.bytes_down,
        unify_seconds=model.unify_seconds,
        inference_ms=round(1_000 * seconds / count, 4),
        routing=routing or None,
        expert_names=names,
        sent=dict(model.sent or {}),
        seconds=0.0,
    )


def training_key(settings: Settings) -> str:
    """Hash of what decides a trained model: all settings but those that say what it is evaluated on and who decodes images, the
    seed, and the code, as far as ``_CODE`` is kept true.
    """
    made_of = settings.model_dump(mode="json", exclude={"preset": True, "data": {"test_corruptions", "evaluate_on", "workers"}})
    return short_hash((made_of, load_seed(settings.seed_model).fingerprint, torch.__version__, _CODE))


def _cache(name: str) -> Path:
    folder = cache_folder() / "benchmark" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
