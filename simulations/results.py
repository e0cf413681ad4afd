"""The table of a run: every method on every domain, from what the run left on disk."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from metamoe.common.compute import place_of, threads
from metamoe.common.config import Metric, Settings
from metamoe.common.data.metrics import answered, metrics_of
from metamoe.common.files import write_atomically, write_json
from metamoe.common.metrics import Metrics
from metamoe.common.model.artifact import load_model, write_card
from metamoe.common.model.batch import Scores
from metamoe.common.model.lora import load_adapter, with_lora
from metamoe.simulations.benchmark.tables import table
from metamoe.simulations.clients import Right, by_client, class_counts
from metamoe.simulations.evaluate import PUBLIC, answers_and_routing, dense, test_sets

UNIFIED = "metamoe"
ZERO_SHOT = "zero-shot"
_HOW_IMAGES = "Each image is named among its own domain's classes, the public ones among all public classes."
_HOW_QUESTIONS = (
    "Of each question the choice with the largest mean log-likelihood a token is taken, of each held-out instruction its own "
    "output among three others."
)
_HOW_TEXT = (
    "Of each prompt the answer with the largest mean log-likelihood a token is taken, of its own and those of three others."
)
_TITLES: dict[Metric, str] = {
    "macro-f1": "Macro F1, %",
    "balanced-accuracy": "Balanced accuracy, %",
    "calibration-error": "Expected calibration error, %",
    "perplexity": "Perplexity of held-out answers",
}


def write_results(settings: Settings, out: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Evaluate zero-shot, each expert and the unified model on every domain's test part and on the held-out public part.

    Writes ``results.json`` and ``report.md`` into the run folder, which a finished run must have filled.

    Args:
        settings: of the run.
        out: the run folder.
        progress: called with the evaluations done and in all.

    Returns:
        The contents of results.json.
    """
    summary = json.loads((out / "server" / "summary.json").read_text())
    loaded = load_model(out / "model", place_of(settings.compute, "server"))
    seed, unified = loaded.seed, loaded.model
    methods: dict[str, Scores] = {ZERO_SHOT: dense(seed.model)}
    for name in loaded.manifest.experts:
        expert = load_adapter(out / "server" / "experts" / name)
        methods[f"expert:{name}"] = dense(with_lora(seed, settings.lora, expert))
    methods[UNIFIED] = unified.scores

    accuracies: dict[str, dict[str, float]] = {method: {} for method in methods}
    metrics: dict[str, dict[str, Metrics]] = {method: {} for method in methods}
    right: dict[str, dict[str, list[Right]]] = {method: defaultdict(list) for method in methods}
    routing: dict[str, dict[str, float]] = {}
    with threads(settings.compute.server_threads), loaded.seed.place.computing():
        sets = test_sets(settings.seed_model, loaded.seed.place, settings.data)
        pairs = list(product(sets, methods))
        for done, (test, method) in enumerate(pairs):
            progress(done, len(pairs))
            if method == UNIFIED:
                found, by_layer = answers_and_routing(unified, test.samples)
                shares = zip(loaded.manifest.expert_names, np.mean(by_layer, axis=0), strict=True)
                routing[test.name] = {name: round(float(share), 4) for name, share in shares}
            else:
                found = answered(methods[method], test.samples)
            answers = test.samples.answers
            right[method][test.domain].append((found.chosen.eq(answers).numpy(), answers.numpy()))
            metrics[method][test.name] = metrics_of(found, test.samples)
            accuracies[method][test.name] = metrics[method][test.name].accuracy
        progress(len(pairs), len(pairs))
    public = {method: by_set.pop(PUBLIC) for method, by_set in accuracies.items()}
    del routing[PUBLIC]
    worst = {method: min(by_domain, key=by_domain.__getitem__) for method, by_domain in accuracies.items()}
    counts = class_counts(settings)
    clients = {method: by_client(settings, counts, by_set) for method, by_set in right.items()}
    for by_domain in accuracies.values():
        by_domain["average"] = round(sum(by_domain.values()) / len(by_domain), 2)
    results = {
        "preset": settings.preset,
        "seed": settings.seed,
        "data": settings.data_sources,
        "model": summary["model"],
        "accuracy": accuracies,
        "public_accuracy": public,
        "metrics": {m: {name: _plain(found) for name, found in by_set.items()} for m, by_set in metrics.items()},
        "worst_domain": worst,
        "client_accuracy": clients,
        "worst_client": {method: min(found, key=found.__getitem__) for method, found in clients.items()},
        "routing": routing,
        "clients": summary["clients"],
        "missing": summary["missing"],
        "timings": summary["timings"],
    }
    write_json(out / "results.json", results)
    write_atomically(out / "report.md", report(settings, results))
    write_card(out / "model", loaded.manifest, settings, table(*accuracy_rows(results)))
    return results


def accuracy_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of methods: its header and its rows. Where several clients share a domain, the worst of them has a column."""
    domains = list(results["routing"])
    found = results.get("client_accuracy", {})
    shared = any(len(clients) > len(domains) for clients in found.values())

    def worst_client(method: str) -> list[str]:
        name = results["worst_client"][method] if shared else ""
        return [f"{found[method][name]:.1f} ({name})"] if shared else []

    rows = [
        [
            method,
            *(f"{by_domain[d]:.1f}" for d in [*domains, "average"]),
            f"{results['public_accuracy'][method]:.1f}",
            f"{min(by_domain.values()):.1f} ({results['worst_domain'][method]})",
            *worst_client(method),
        ]
        for method, by_domain in results["accuracy"].items()
    ]
    header = ["method", *domains, "average", "public, held out", "worst domain"]
    return [*header, *(["worst client"] if shared else [])], rows


def shown_metrics(settings: Settings) -> list[Metric]:
    """What tables have beside accuracy: what settings ask for, and of text perplexity, which is what it is about."""
    return list(dict.fromkeys([*(("perplexity",) if settings.data.source == "text" else ()), *settings.metrics]))


def metric_rows(results: dict[str, Any], metric: Metric) -> list[list[str]]:
    """A table's rows: each method with a metric on every domain and, last, on the public samples."""
    name = metric.replace("-", "_")
    sets = [*results["routing"], PUBLIC]

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if metric == "perplexity" else f"{value:.1f}"

    return [[method, *(cell(by_set[d][name]) for d in sets)] for method, by_set in results["metrics"].items()]


def _plain(found: Metrics) -> dict[str, Any]:
    """As it is read back from JSON, which has lists and no tuples."""
    return {**asdict(found), "interval": list(found.interval)}


def report(settings: Settings, results: dict[str, Any]) -> str:
    """results.json for a human reader, in Markdown."""
    domains = list(results["routing"])
    experts = list(results["routing"][domains[0]])
    lines = [f"# MetaMoE-FL: preset {settings.preset}, seed {settings.seed}", "", f"Unified model {results['model']}", ""]
    if results["missing"]:
        lines += ["## Missing clients", ""]
        lines += table(["client", "stage", "reason"], [[m["name"], m["stage"], m["reason"]] for m in results["missing"]])
        lines += [""]
    title = "Told from others' answers" if settings.data.source == "text" else "Accuracy"
    how = {"questions": _HOW_QUESTIONS, "text": _HOW_TEXT}.get(settings.data.source, _HOW_IMAGES)
    lines += [f"## {title} on {settings.data.evaluate_on} data, %", "", how, ""]
    lines += table(*accuracy_rows(results))
    for metric in shown_metrics(settings):
        lines += ["", f"## {_TITLES[metric]}", ""]
        lines += table(["method", *domains, "public, held out"], metric_rows(results, metric))
    lines += ["", "## Where tokens went", ""]
    lines += table(["domain", *experts], [[d, *(f"{results['routing'][d][e]:.3f}" for e in experts)] for d in domains])
    lines += ["", "## What each client transmitted", ""]
    rows = [[c["name"], f"{c['bytes_up']:,}", f"{c['bytes_down']:,}", str(len(c["artifacts"]))] for c in results["clients"]]
    lines += table(["client", "bytes up", "bytes down", "arrays sent"], rows)
    lines += ["", "Bytes are those of the arrays; results.json lists every array with its dtype, shape and SHA-256.", ""]
    lines += ["## Time", ""]
    lines += table(["stage", "seconds"], [[stage, f"{seconds:.1f}"] for stage, seconds in results["timings"].items()])
    return "\n".join(lines) + "\n"
