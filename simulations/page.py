"""The page of one run: one HTML file that needs nothing else, of what the run left in its folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image, ImageOps

from metamoe.audit.page import Html, array_table, document, join, table, tag
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_private, load_public
from metamoe.common.errors import InputFileError
from metamoe.common.events import Event, read_events
from metamoe.common.files import read_json, write_atomically
from metamoe.common.presets import load_settings
from metamoe.server.proxies import read_selections
from metamoe.simulations.benchmark.pictures import curve_picture, share_picture
from metamoe.simulations.benchmark.report import REPORT, picture, png_picture
from metamoe.simulations.benchmark.tables import Sent
from metamoe.simulations.results import accuracy_rows

_SHOWN = 10
"""Samples of a domain, and as many proxies."""
_PIXELS = 64
_WORDS = 60


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder: its table, the curves of every training, where tokens went, each client's
    proxies beside samples of its own, what each sent, times and memory.

    What the run's machine does not have is left out: a deployed run's page has neither private samples nor the clients' curves.

    Returns:
        The page's file.

    Raises:
        InputFileError: the folder holds no run that has come to its end.
    """
    try:
        summary = read_json(folder / "server" / "summary.json")
        settings = load_settings(str(folder / "settings.toml"))
    except FileNotFoundError as error:
        raise InputFileError(f"{folder} holds no run that has come to its end: {error.filename} is not there") from error
    results = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
    parts = {
        "Accuracy": _accuracy(settings, results) if results else _reported(summary["reported"]),
        "Training": _training(folder, settings),
        "Where tokens go": _routing(results.get("routing", {})),
        "Proxies": _proxies(folder, settings, bool(results)),
        "What each client sent": _sent(summary["clients"]),
        "Time and memory": _costs(summary),
    }
    sections = [tag("section", tag("h2", heading), content) for heading, content in parts.items() if content]
    page = document(f"MetaMoE-FL run, preset {settings.preset}", _overview(folder, settings, summary), *sections)
    write_atomically(folder / REPORT, page)
    return folder / REPORT


def _overview(folder: Path, settings: Settings, summary: dict[str, Any]) -> Html:
    missing = "; ".join(f"{m['name']} ({m['stage']}: {m['reason']})" for m in summary["missing"])
    facts = {
        "unified model": tag("code", summary["model"]),
        "preset": settings.preset,
        "seed": str(settings.seed),
        "seed model": settings.seed_model,
        "clients": ", ".join(client["name"] for client in summary["clients"]),
        "missing": missing or "none",
    }
    listed = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    written = (folder / "settings.toml").read_text()
    return join([tag("dl", *listed), tag("details", tag("summary", "All settings"), tag("pre", written))])


def _accuracy(settings: Settings, results: dict[str, Any]) -> Html:
    note = tag("p", f"On {settings.data.evaluate_on} data, in percent.", class_="note")
    return join([_table(*accuracy_rows(results)), note])


def _reported(reported: dict[str, float]) -> Html:
    """What clients of a deployed run said of the delivered model."""
    rows = [[name, f"{accuracy:.1f}"] for name, accuracy in reported.items()]
    return _table(["client", "accuracy on its own data, %"], rows) if rows else Html()


def _training(folder: Path, settings: Settings) -> Html:
    """The curves of every training whose events are on this machine."""
    logs = {name: folder / "clients" / name / "events.jsonl" for name in settings.member_names}
    curves = {name: curve for name, file in logs.items() if (curve := _measured(file, "expert"))}
    parts = []
    if curves:
        unit = "step" if settings.privacy.expert == "dp-sgd" else "epoch"
        parts += [tag("h3", "Experts"), picture(curve_picture(curves, unit), _words(curves))]
    if router := _measured(folder / "events.jsonl", "unify"):
        one = {"router": router}
        parts += [tag("h3", "Router"), picture(curve_picture(one, "epoch"), _words(one))]
    return join(parts)


def _measured(file: Path, stage: str) -> list[Event]:
    """The events of a training with what was measured, each epoch once: the last, where it was done again; of an expert that
    was trained in two parts, those of the second.
    """
    events = [event for event, _ in read_events(file) if event.stage == stage and event.metrics]
    found = {event.done: event for event in events if event.total == events[-1].total}
    return [found[done] for done in sorted(found)]


def _words(curves: dict[str, list[Event]]) -> str:
    """What a picture of curves shows, for those who do not see it."""
    last = {name: events[-1] for name, events in curves.items()}
    said = (f"{n}: {', '.join(f'{what} {v:.4g}' for what, v in e.metrics.items())}" for n, e in last.items())
    return f"Loss and validation by epoch. At the end: {'; '.join(said)}"


def _routing(routing: dict[str, dict[str, float]]) -> Html:
    if not routing:
        return Html()
    experts = list(next(iter(routing.values())))
    shares = np.array([[of[expert] for expert in experts] for of in routing.values()])
    words = "; ".join(f"{domain}: most to {max(of, key=of.__getitem__)}" for domain, of in routing.items())
    note = tag("p", "Share of a domain's tokens whose most likely expert is the column's; a row sums to one.", class_="note")
    return join([picture(share_picture(shares, list(routing), experts), f"Share of tokens at each expert. {words}"), note])


def _proxies(folder: Path, settings: Settings, simulated: bool) -> Html:
    """Each client's proxies, the most relevant first, and in a simulation samples of its own above them."""
    if not (folder / "proxies.json").is_file():
        return Html()
    parts = []
    for name, best in _best_proxies(folder, settings).items():
        rows = {"its proxies": best}
        if simulated:
            own = load_private(settings, settings.client_names.index(name), "train")
            spread = np.linspace(0, len(own) - 1, min(_SHOWN, len(own))).astype(int)
            rows = {"its own samples": own.select(spread)} | rows
        parts.append(tag("div", tag("h3", name), *(_samples(what, data) for what, data in rows.items()), class_="group"))
    note = f"Of {settings.proxies.count} proxies a client those with the largest relevance."
    return join([*parts, tag("p", note, class_="note")])


def sample_sheets(folder: Path) -> dict[str, Image.Image]:
    """A picture of each client's most relevant proxies; of a run without pictures, none."""
    settings = load_settings(str(folder / "settings.toml"))
    shown = _best_proxies(folder, settings) if (folder / "proxies.json").is_file() else {}
    return {name: _sheet(data) for name, data in shown.items() if "image" in data.features}


def _best_proxies(folder: Path, settings: Settings) -> dict[str, Dataset]:
    """Of each client's proxies the most relevant, in this order."""
    public = load_public(settings.data)
    ranked = {
        name: selection.ids[np.argsort(-selection.scores, kind="stable")[:_SHOWN]]
        for name, selection in read_selections(folder / "proxies.json").items()
    }
    return {name: public.select(ids) for name, ids in ranked.items()}


def _samples(what: str, data: Dataset) -> Html:
    """Some samples in a row: small pictures, or the beginnings of texts."""
    title = tag("p", what, class_="note")
    if "image" not in data.features:
        beginnings = (" ".join(str(row["prompt"]).split()) for row in data)
        short = (text if len(text) <= _WORDS else text[: _WORDS - 1] + "…" for text in beginnings)
        return join([title, tag("ul", *(tag("li", text) for text in short))])
    names = data.features["label"].names
    return join([title, png_picture(_sheet(data), f"{what}: {', '.join(names[label] for label in data['label'])}")])


def _sheet(data: Dataset) -> Image.Image:
    """Images side by side."""
    sheet = Image.new("RGB", (len(data) * _PIXELS, _PIXELS), "white")
    for column, image in enumerate(data["image"]):
        sheet.paste(ImageOps.contain(image.convert("RGB"), (_PIXELS - 4, _PIXELS - 4)), (column * _PIXELS + 2, 2))
    return sheet


def _sent(clients: Sequence[dict[str, Any]]) -> Html:
    parts = []
    for client in clients:
        arrays = [Sent.model_validate(array) for array in client["artifacts"]]
        total = f"{len(arrays)} arrays, {client['bytes_up']:,} bytes; {client['bytes_down']:,} bytes received"
        parts.append(tag("details", tag("summary", tag("strong", client["name"]), f" {total}"), array_table(arrays)))
    return join(parts)


def _costs(summary: dict[str, Any]) -> Html:
    rows = [[stage, f"{wall:,.1f}", f"{summary['cpu_seconds'][stage]:,.1f}"] for stage, wall in summary["timings"].items()]
    memory = ", ".join(f"{what} {size / 2**20:,.0f} MiB" for what, size in summary["peak_memory"].items())
    note = tag("p", f"At the server. Its largest memory: {memory}.", class_="note")
    return join([_table(["stage", "seconds", "CPU seconds"], rows), note])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    cells = [(tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    return table(header, [tag("tr", *row) for row in cells])
