"""Methods times seeds, into one table: every part is done once, in two processes at a time, and a stopped benchmark goes on."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np

from metamoe.common.compute import place_of, threads
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_public
from metamoe.common.errors import InputFileError, InvalidSettingError, MetaMoEError, RunFailedError
from metamoe.common.files import write_atomically, write_json
from metamoe.common.presets import changed, to_toml
from metamoe.server.proxies import check_pool
from metamoe.simulations.benchmark.methods import Method, ablations, main_methods
from metamoe.simulations.benchmark.models import Outcome, build, outcome_of, short_hash, training_key
from metamoe.simulations.benchmark.projection import project
from metamoe.simulations.benchmark.tables import FORMAT, REFERENCE, RESULTS, Record, Results, Sent, markdown
from metamoe.simulations.prepare import prepare

PARALLEL = 2


@dataclass(frozen=True)
class Plan:
    """What a benchmark runs: settings, methods, seeds, where results go, and the command or call that asks for it."""

    base: Settings
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    out: Path
    command: str = ""

    def settings(self, method: Method | None, seed: int) -> Settings:
        """The settings of one method with one seed. One thread each, as several run at a time."""
        changes = method.settings if method else ()
        return changed(self.base, [*changes, f"seed={seed}", "compute.server-threads=1", "report-accuracy=false"])

    def file(self, method: Method, seed: int) -> Path:
        """Where the outcome of one method with one seed is kept: by the hash of what decides it."""
        settings = self.settings(method, seed)
        made_of = (FORMAT, method.use, method.client, training_key(settings), settings.data.model_dump(mode="json"))
        return self.out / "outcomes" / f"{short_hash(made_of)}.json"


def run_benchmark(plan: Plan, progress: Callable[[int, int, str], None]) -> Results:
    """Run what is not there yet of a plan; write ``results.json``, ``projection.json`` and ``tables.md`` into its folder.

    Args:
        plan: what to run. The results show everything of its preset that is done for its seeds, by earlier calls too.
        progress: called with parts done, parts in all, and what has just been done.

    Raises:
        InvalidSettingError: a method does not go with the preset.
        RunFailedError: a process of the benchmark died.
        MetaMoEError: what stops a part.
    """
    try:
        return _run(plan, progress)
    except BrokenProcessPool as error:
        raise RunFailedError(
            "a process of the benchmark died: it ran out of memory, or, in a Python script, the call is not under "
            "'if __name__ == \"__main__\":', without which every process starts the script again"
        ) from error


def _run(plan: Plan, progress: Callable[[int, int, str], None]) -> Results:
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
    with threads(settings.compute.server_threads), place_of(settings.compute, "server").computing():
        model = build(method, settings)
        outcome = outcome_of(settings, model)
    write_json(file, {**asdict(outcome), "seconds": round(time.monotonic() - started, 1)})


def collect(plan: Plan) -> Results:
    """Everything of a preset that is done for all seeds of a plan, as results."""
    settings = plan.settings(None, plan.seeds[0])
    main, extra = list(_done(plan, main_methods(settings))), list(_done(plan, ablations(settings)))
    first = next((outcomes[0] for method, outcomes in main if method.name == REFERENCE), None)
    return Results(
        format=FORMAT,
        command=plan.command,
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
    if without := methods[0].without:
        raise InvalidSettingError(f"without = {list(without)} is for a run; in a benchmark every client takes part")
    for method, settings in zip(plan.methods, methods, strict=True):
        if method.use == "pooled" and settings.experts.max < settings.clients:
            raise InvalidSettingError(
                f"experts.max = {settings.experts.max} with clients = {settings.clients}: {method.name} needs an expert for "
                "every client"
            )
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(_prepare_data, plan.settings(None, plan.seeds[0]), methods).result()


def _prepare_data(base: Settings, methods: Sequence[Settings]) -> None:
    prepare(base, on_ray=False)
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
        right={test: [outcome.right[test] for outcome in outcomes] for test in outcomes[0].right},
        public=[outcome.public for outcome in outcomes],
        own_expert_share=[outcome.own_expert_share for outcome in outcomes],
        bytes_up=[outcome.bytes_up for outcome in outcomes],
        bytes_down=[outcome.bytes_down for outcome in outcomes],
        unify_seconds=[outcome.unify_seconds for outcome in outcomes],
        inference_ms=[outcome.inference_ms for outcome in outcomes],
        routing=[outcome.routing for outcome in outcomes],
        expert_names=outcomes[0].expert_names,
    )


def _project(plan: Plan) -> None:
    """Coordinates for the picture of proxies beside private samples, worked out once for these settings."""
    settings = plan.settings(None, plan.seeds[0])
    file = plan.out / "outcomes" / f"projection-{training_key(settings)}.json"
    if not file.is_file():
        write_json(file, {"clients": project(settings)})
    write_atomically(plan.out / "projection.json", file.read_bytes())
