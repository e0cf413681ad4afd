"""The table of a run: every method on every domain, from what the run left on disk."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from common.compute import threads
from common.config import Settings
from common.data.datasets import load_domain, load_public
from common.data.tasks import accuracy, all_pixels, class_logits, class_names, labels_in, text_features
from common.files import write_atomically, write_json
from common.model.artifact import load_model
from common.model.lora import load_adapter, with_lora
from common.model.moe import UnifiedModel
from common.model.seed import embed, load_seed

UNIFIED = "metamoe"
ZERO_SHOT = "zero-shot"

Logits = Callable[..., Tensor]
"""Class scores [B, C] of pixel values, given text features ``texts`` [C, p]."""


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
    seed = load_seed(settings.seed_model)
    summary = json.loads((out / "server" / "summary.json").read_text())
    unified = load_model(out / "model").model
    methods: dict[str, Logits] = {ZERO_SHOT: _dense(seed.model)}
    for name in settings.client_names:
        expert = load_adapter(out / "server" / "experts" / name)
        methods[f"expert:{name}"] = _dense(with_lora(seed, settings.lora, expert))
    methods[UNIFIED] = unified.logits

    accuracies: dict[str, dict[str, float]] = {method: {} for method in methods}
    public: dict[str, float] = {}
    routing: dict[str, dict[str, float]] = {}
    tests = {domain: load_domain(settings.data, domain, "test") for domain in settings.data.domains}
    done, total = 0, len(methods) * (len(tests) + 1)
    with torch.inference_mode(), threads(settings.compute.server_threads):
        for domain, test in {**tests, "": load_public(settings.data, "test")}.items():
            names = class_names(test)
            texts = text_features(seed, names, settings.data.prompt)
            pixels, labels = all_pixels(seed, test), labels_in(test, names)
            for method, logits in methods.items():
                progress(done, total)
                percent = round(accuracy(partial(logits, texts=texts), pixels, labels), 2)
                if domain:
                    accuracies[method][domain] = percent
                else:
                    public[method] = percent
                done += 1
            if domain:
                routing[domain] = dict(zip(settings.client_names, expert_shares(unified, pixels), strict=True))
    progress(total, total)
    for by_domain in accuracies.values():
        by_domain["average"] = round(sum(by_domain.values()) / len(by_domain), 2)
    results = {
        "preset": settings.preset,
        "seed": settings.seed,
        "model": summary["model"],
        "accuracy": accuracies,
        "public_accuracy": public,
        "routing": routing,
        "clients": summary["clients"],
        "timings": summary["timings"],
    }
    write_json(out / "results.json", results)
    write_atomically(out / "report.md", report(settings, results))
    return results


@torch.inference_mode()
def expert_shares(model: UnifiedModel, pixels: Tensor) -> list[float]:
    """Share of all tokens whose most likely expert is each of the K, over all layers that decide."""
    counts: Tensor | None = None
    for batch in pixels.split(256):
        _, decisions = model(batch)
        chosen = torch.cat([decision.argmax(-1).flatten() for decision in decisions])
        part = torch.bincount(chosen, minlength=decisions[0].shape[-1])
        counts = part if counts is None else counts + part
    if counts is None:
        return []
    return [round(share, 4) for share in (counts / counts.sum()).tolist()]


def _dense(model: CLIPModel) -> Logits:
    return lambda pixels, texts: class_logits(model, embed(model, pixels), texts)


def report(settings: Settings, results: dict[str, Any]) -> str:
    """results.json for a human reader, in Markdown."""
    domains = list(settings.data.domains)
    clients = settings.client_names
    lines = [f"# MetaMoE-FL: preset {settings.preset}, seed {settings.seed}", "", f"Unified model {results['model']}", ""]
    lines += [
        "## Accuracy on test data, %",
        "",
        "Each image is named among its own domain's classes, the public ones among all public classes.",
        "",
    ]
    rows = [
        [method, *(f"{by_domain[d]:.1f}" for d in [*domains, "average"]), f"{results['public_accuracy'][method]:.1f}"]
        for method, by_domain in results["accuracy"].items()
    ]
    lines += _table(["method", *domains, "average", "public, held out"], rows)
    lines += ["", "## Where tokens went", ""]
    lines += _table(["domain", *clients], [[d, *(f"{results['routing'][d][c]:.3f}" for c in clients)] for d in domains])
    lines += ["", "## What each client transmitted", ""]
    rows = [[c["name"], f"{c['bytes_up']:,}", f"{c['bytes_down']:,}", str(len(c["artifacts"]))] for c in results["clients"]]
    lines += _table(["client", "bytes up", "bytes down", "arrays sent"], rows)
    lines += ["", "Bytes are those of the arrays; results.json lists every array with its dtype, shape and SHA-256.", ""]
    lines += ["## Time", ""]
    lines += _table(["stage", "seconds"], [[stage, f"{seconds:.1f}"] for stage, seconds in results["timings"].items()])
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
