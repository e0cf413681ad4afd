"""Methods times seeds, into one table: every part is done once, in two processes at a time, and a stopped benchmark goes on."""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from metamoe.client.app import respond
from metamoe.client.site import Site
from metamoe.common.compute import threads
from metamoe.common.config import Settings, changed, to_toml
from metamoe.common.data.datasets import load_private, load_public
from metamoe.common.data.tasks import Scores, accuracy
from metamoe.common.errors import InputFileError, InvalidSettingError, MetaMoEError
from metamoe.common.files import cache_folder, replaced_folder, write_atomically, write_json
from metamoe.common.model.artifact import Loaded, load_model, save_model
from metamoe.common.model.lora import Expert, load_adapter, save_adapter, with_lora
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.wire import Kind, RecordDict, encode_reply
from metamoe.server.proxies import check_pool
from metamoe.server.stages import run_stages
from metamoe.server.unify import router_samples, unify
from metamoe.simulations.benchmark.fedavg import federated_average
from metamoe.simulations.benchmark.methods import Method, ablations, main_methods
from metamoe.simulations.benchmark.projection import project
from metamoe.simulations.benchmark.tables import FORMAT, REFERENCE, RESULTS, Record, Results, Sent, markdown
from metamoe.simulations.evaluate import (
    PUBLIC,
    accuracy_and_routing,
    dense,
    domains_of,
    ensemble,
    own_share,
    routed_ensemble,
    sample_decision,
    soup,
    test_sets,
)
from metamoe.simulations.prepare import prepare

PARALLEL = 2
# Raise it whenever a change of code changes numbers: what was worked out before is then worked out again.
_CODE = 1
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
class Plan:
    """What a benchmark runs: settings, methods, seeds, and where results go."""

    base: Settings
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    out: Path

    def settings(self, method: Method | None, seed: int) -> Settings:
        """The settings of one method with one seed. One thread each, as several run at a time."""
        changes = method.settings if method else ()
        return changed(self.base, [*changes, f"seed={seed}", "compute.server-threads=1", "report-accuracy=false"])

    def file(self, method: Method, seed: int) -> Path:
        """Where the outcome of one method with one seed is kept: by the hash of what decides it."""
        settings = self.settings(method, seed)
        made_of = (method.use, method.client, _training_key(settings), settings.data.model_dump(mode="json"))
        return self.out / "outcomes" / f"{_hash(made_of)}.json"


@dataclass(frozen=True)
class Outcome:
    """What one method reached with one seed; see :class:`metamoe.simulations.benchmark.tables.Record`."""

    domains: dict[str, float]
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


def run_benchmark(plan: Plan, progress: Callable[[int, int, str], None]) -> Results:
    """Run what is not there yet of a plan; write ``results.json``, ``projection.json`` and ``tables.md`` into its folder.

    Args:
        plan: what to run. The results show everything of its preset that is done for its seeds, by earlier calls too.
        progress: called with parts done, parts in all, and what has just been done.
    """
    _prepare(plan)
    parts = [(method, seed) for method in plan.methods for seed in plan.seeds]
    missing = [part for part in parts if not plan.file(*part).is_file()]
    done = len(parts) - len(missing)
    progress(done, len(parts), "")
    with ProcessPoolExecutor(PARALLEL, get_context("spawn")) as pool:
        try:
            waiting = {pool.submit(run_part, plan, *part): part for part in missing}
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    method, seed = waiting.pop(future)
                    done += 1
                    progress(done, len(parts), f"{method.name}, seed {seed}")
            pool.submit(_project, plan).result()
        except BaseException:
            # Whatever it was, also Ctrl-C: the other parts end now, and what is done is kept.
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.kill()
            raise
    results = collect(plan)
    write_atomically(plan.out / RESULTS, results.model_dump_json(indent=1) + "\n")
    write_atomically(plan.out / "tables.md", markdown(results))
    return results


def run_part(plan: Plan, method: Method, seed: int) -> None:
    """One method with one seed, from data to a file with its outcome."""
    started = time.monotonic()
    settings, file = plan.settings(method, seed), plan.file(method, seed)
    with threads(settings.compute.server_threads):
        model = _build(method, settings)
        outcome = _evaluate(settings, model)
    write_json(file, {**asdict(outcome), "seconds": round(time.monotonic() - started, 1)})


def collect(plan: Plan) -> Results:
    """Everything of a preset that is done for all seeds of a plan, as results."""
    settings = plan.settings(None, plan.seeds[0])
    main, extra = list(_done(plan, main_methods(settings))), list(_done(plan, ablations(settings)))
    first = next((outcomes[0] for method, outcomes in main if method.name == REFERENCE), None)
    return Results(
        format=FORMAT,
        command=shlex.join(["metamoe", *sys.argv[1:]]),
        date=date.today().isoformat(),
        version=version("metamoe-fl"),
        part_seconds=round(sum(outcome.seconds for _, outcomes in [*main, *extra] for outcome in outcomes), 1),
        preset=settings.preset,
        settings=to_toml(settings),
        evaluated_on=settings.data.evaluate_on,
        seeds=list(plan.seeds),
        clients=settings.client_names,
        methods={method.name: _record(method, outcomes) for method, outcomes in main},
        ablations={method.name: _record(method, outcomes) for method, outcomes in extra},
        sent={name: [Sent.model_validate(array) for array in arrays] for name, arrays in first.sent.items()} if first else {},
    )


def _prepare(plan: Plan) -> None:
    """Find what is wrong or missing before the first hour is spent."""
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputFileError(f"--out {plan.out} cannot be used: {error}") from error
    methods = [plan.settings(method, plan.seeds[0]) for method in plan.methods]
    for method, settings in zip(plan.methods, methods, strict=True):
        if method.use in ("pooled", "routed-ensemble") and settings.experts.max < settings.clients:
            raise InvalidSettingError(
                f"experts.max = {settings.experts.max} with clients = {settings.clients}: {method.name} needs an expert for "
                "every client"
            )
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(_prepare_data, plan.settings(None, plan.seeds[0]), methods).result()


def _prepare_data(base: Settings, methods: Sequence[Settings]) -> None:
    prepare(base)
    for settings in methods:
        check_pool(settings.proxies, len(load_public(settings.data)))


def _done(plan: Plan, methods: Sequence[Method]) -> Iterator[tuple[Method, list[Outcome]]]:
    for method in methods:
        try:
            files = [plan.file(method, seed) for seed in plan.seeds]
        except MetaMoEError:
            # Its settings do not go with this preset, so it was never run.
            continue
        if all(file.is_file() for file in files):
            yield method, [Outcome(**json.loads(file.read_text())) for file in files]


def _record(method: Method, outcomes: Sequence[Outcome]) -> Record:
    return Record(
        about=method.about,
        private=method.private,
        group=method.group,
        average=[round(float(np.mean(list(outcome.domains.values()))), 3) for outcome in outcomes],
        domains={domain: [outcome.domains[domain] for outcome in outcomes] for domain in outcomes[0].domains},
        public=[outcome.public for outcome in outcomes],
        own_expert_share=[outcome.own_expert_share for outcome in outcomes],
        bytes_up=[outcome.bytes_up for outcome in outcomes],
        bytes_down=[outcome.bytes_down for outcome in outcomes],
        unify_seconds=[outcome.unify_seconds for outcome in outcomes],
        inference_ms=[outcome.inference_ms for outcome in outcomes],
        routing=[outcome.routing for outcome in outcomes],
        expert_names=outcomes[0].expert_names,
    )


def _build(method: Method, settings: Settings) -> Model:
    """Everything up to a model that can be asked."""
    seed = load_seed(settings.seed_model)
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
        case "routed-ensemble":
            model = load_model(folder / "model", settings.compute.server_device).model
            members = [*alone, dense(seed.model)][: len(settings.expert_names)]
            routed = routed_ensemble(members, partial(sample_decision, model), settings.router.top_k)
            return Model(dict.fromkeys(everywhere, routed), up, down, summary["cpu_seconds"]["unify"])
        case "soup":
            merged, lora = soup(experts, settings.lora)
            return Model(dict.fromkeys(everywhere, dense(with_lora(seed, lora, merged))), up, down)
        case "pooled":
            return _pooled(seed, settings, folder, experts, down, everywhere)
        case _:
            unified = load_model(folder / "model", settings.compute.server_device)
            sent = {client["name"]: client["artifacts"] for client in clients}
            spent = summary["cpu_seconds"]["unify"]
            scores = dict.fromkeys(everywhere, unified.model.scores)
            return Model(scores, up, down, spent, unified, sent, summary["merged"])


def _run(settings: Settings) -> Path:
    """The run folder of these settings, after running the stages if that was not done before.

    Clients answer in this process. Runs, and what clients keep, their experts above all, lie in the cache by what made them, so
    that an expert is trained once, whatever the table.
    """
    folder = _cache("runs") / _training_key(settings)
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
    private = [load_private(settings, client, "train") for client in range(settings.clients)]
    target, times = folder / "pooled", folder / "pooled.json"
    with FileLock(f"{target}.lock"):
        if not times.is_file():
            routers = [router.weights() for router in load_model(folder / "model").model.routers]
            trained = settings.model_copy(update={"router_training": settings.router_training.model_copy(update=_POOLED)})
            samples = router_samples(trained, load_public(settings.data), private)
            started = time.process_time()
            weights = unify(seed, trained, experts, routers, samples, _quietly)
            spent = time.process_time() - started
            save_model(target, seed, settings, settings.client_names, [], weights)
            write_json(times, {"cpu_seconds": round(spent, 3)})
    unified = load_model(target, settings.compute.server_device)
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
    target = _cache("fedavg") / _training_key(settings)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            private = [load_private(settings, client, "train") for client in range(settings.clients)]
            with replaced_folder(target) as new:
                expert = federated_average(seed, settings, private, load_public(settings.data), rounds)
                save_adapter(new, seed, settings.lora, expert)
    expert = load_adapter(target)
    scores = dense(with_lora(seed, settings.lora, expert))
    # Clients send float16, as experts do; what comes back is the mean, in float32.
    numbers = float(rounds * sum(tensor.numel() for tensor in expert.values()))
    return Model(dict.fromkeys(everywhere, scores), 2 * numbers + rounds * _LABEL_BYTES, 4 * numbers)


def _evaluate(settings: Settings, model: Model) -> Outcome:
    sets = test_sets(settings.seed_model, settings.data)
    domains: dict[str, float] = {}
    seconds = count = 0.0
    # The first batch pays for what is set up once.
    model.scores[sets[0].domain](sets[0].samples.asked(torch.arange(4)))
    routing: dict[str, list[list[float]]] = {}
    for test in sets[:-1]:
        started = time.process_time()
        if model.unified is not None:
            percent, routing[test.name] = accuracy_and_routing(model.unified.model, test.samples)
        else:
            percent = accuracy(model.scores[test.domain], test.samples)
        domains[test.name] = round(percent, 3)
        seconds, count = seconds + time.process_time() - started, count + len(test.samples.answers)
    names = model.unified.manifest.expert_names if model.unified is not None else []
    owners = [domains_of(settings, name, model.merged) for name in names]
    own = [own_share(owners, test, routing[test.name]) for test in sets[:-1] if any(test.domain in some for some in owners)]
    return Outcome(
        domains=domains,
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


def _project(plan: Plan) -> None:
    """Coordinates for the picture of proxies beside private samples, worked out once for these settings."""
    settings = plan.settings(None, plan.seeds[0])
    file = plan.out / "outcomes" / f"projection-{_training_key(settings)}.json"
    if not file.is_file():
        write_json(file, {"clients": project(settings)})
    write_atomically(plan.out / "projection.json", file.read_bytes())


def _training_key(settings: Settings) -> str:
    """Hash of what decides a trained model: all settings but those that say what it is evaluated on and who decodes images, the
    seed, and the code, as far as ``_CODE`` is kept true.
    """
    made_of = settings.model_dump(mode="json", exclude={"preset": True, "data": {"test_corruptions", "evaluate_on", "workers"}})
    return _hash((made_of, load_seed(settings.seed_model).fingerprint, torch.__version__, _CODE))


def _cache(name: str) -> Path:
    folder = cache_folder() / "benchmark" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _quietly(_done: int, _total: int) -> None:
    """No progress within a part."""
