"""The page of a benchmark: one HTML file that needs nothing else, for showing to somebody."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import Field, ValidationError

from metamoe.audit.page import Html, array_table, document, join, table, tag
from metamoe.common.errors import InputFileError, first_problem
from metamoe.common.files import write_atomically
from metamoe.simulations.benchmark.pictures import (
    DPI,
    ORACLE,
    accuracy_picture,
    gains_picture,
    mean_routing,
    proxies_picture,
    routing_picture,
)
from metamoe.simulations.benchmark.tables import (
    REFERENCE,
    RESULTS,
    Record,
    Results,
    Sent,
    Strict,
    difference,
    mean_and_deviation,
    read_results,
    samples_text,
)

REPORT = "report.html"
PROJECTION = "projection.json"
REMEDY = "delete it and run the benchmark again"
PIXELS_PER_INCH = 104
ROUTED = (REFERENCE, "metamoe-paper")

Coordinate = Annotated[float, Field(allow_inf_nan=False)]
Points = Annotated[list[tuple[Coordinate, Coordinate]], Field(min_length=1)]


class Projected(Strict):
    """A client's private samples, and its proxies as three ways of selection choose them, in two dimensions."""

    private: Points
    random: Points
    relevance: Points
    dpp: Points


class Projection(Strict):
    """Contents of projection.json."""

    clients: dict[str, Projected]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a benchmark's folder: what was run, its tables and pictures, and what each client sent.

    The page holds its style and pictures, and runs no script. It is made of ``results.json`` and, if there is one, of
    ``projection.json``; what was not part of the run is left out.

    Returns:
        The page's file.

    Raises:
        InputFileError: a file is missing or not a benchmark's.
    """
    results, projection = read_results(folder), read_projection(folder)
    if others := sorted(projection.clients.keys() - set(results.clients)):
        raise InputFileError(f"{folder / PROJECTION} has client {others[0]!r}, which {RESULTS} has not; {REMEDY}")
    write_atomically(folder / REPORT, report_page(results, projection))
    return folder / REPORT


def read_projection(folder: Path) -> Projection:
    """The projection in a benchmark's folder; one without clients if there is none.

    Raises:
        InputFileError: the file is not a projection.
    """
    file = folder / PROJECTION
    try:
        return Projection.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return Projection(clients={})
    except OSError as error:
        raise InputFileError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        raise InputFileError(f"{file} is not a projection: {first_problem(error)}; {REMEDY}") from error


def report_page(results: Results, projection: Projection) -> str:
    """The whole page."""
    parts = {
        "Accuracy": accuracy(results),
        "What it costs": cost_table(results.methods) if results.methods else Html(),
        "Ablations": ablations(results),
        "Where tokens go": routing(results.methods),
        "Proxies and private data": proxies(projection),
        "What each client sent": sent(results.sent),
    }
    title = f"MetaMoE-FL benchmark, preset {results.preset}"
    there = [(heading.lower().replace(" ", "-"), heading, content) for heading, content in parts.items() if content]
    links = [tag("a", heading, href=f"#{anchor}") for anchor, heading, _ in there]
    sections = [tag("section", tag("h2", heading), content, id=anchor) for anchor, heading, content in there]
    if absent := missing(results, projection):
        sections.append(tag("p", f"Not part of this run, and so not on this page: {'; '.join(absent)}.", class_="note"))
    return document(title, overview(results), tag("nav", *links), *sections)


def missing(results: Results, projection: Projection) -> list[str]:
    """What a benchmark can have and this one has not, in words."""
    reference = results.methods.get(REFERENCE)
    absent = {
        f"the method {REFERENCE}, and so the differences to it": reference is None,
        "ablations": not results.ablations,
        f"the routing of {REFERENCE}": reference is not None and not mean_routing(reference),
        f"a projection of proxies and private data ({PROJECTION})": not projection.clients,
        "the list of what each client sent": not results.sent,
    }
    return [what for what, is_missing in absent.items() if is_missing]


def overview(results: Results) -> Html:
    """What was run."""
    hours, minutes = divmod(round(results.part_seconds / 60), 60)
    facts = {
        "command": tag("code", results.command),
        "date": results.date,
        "version": results.version,
        "preset": results.preset,
        "seeds": ", ".join(map(str, results.seeds)),
        "clients": ", ".join(results.clients),
        "time of all parts, added up": f"{hours} h {minutes} min",
    }
    listed = [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    settings = tag("details", tag("summary", "All settings"), tag("pre", results.settings))
    return join([tag("dl", *listed), settings])


def accuracy(results: Results) -> Html:
    """Every method: picture and table."""
    if not results.methods:
        return Html()
    reference = results.methods.get(REFERENCE)
    listed = ", ".join(f"{name} {_mean(record.average, 1)}" for name, record in results.methods.items())
    png = accuracy_picture(results.methods, results.evaluated_on)
    shown = picture(png, f"Average accuracy of each method in percent: {listed}")
    notes = [
        f"Accuracy on {results.evaluated_on} data in percent, mean over the seeds.",
        *([] if len(results.seeds) == 1 else ["± is the standard deviation over the seeds, brackets are 95% intervals."]),
        *([] if reference is None else [f"“{REFERENCE} is better by” is paired seed by seed."]),
        *(
            ["“On other samples”: its 95% interval by a bootstrap over the test samples, with the same seeds."]
            if reference is not None and reference.right
            else []
        ),
        "Bold: the best in its column of the methods in which no private sample leaves a client"
        + (f" ({ORACLE} aside, as it is told each image's domain)." if ORACLE in results.methods else "."),
    ]
    return join([shown, method_table(results.methods, reference), tag("p", " ".join(notes), class_="note")])


def ablations(results: Results) -> Html:
    """What each part of the method contributes: picture, and a table for each question."""
    reference = results.methods.get(REFERENCE)
    parts = []
    if reference is not None and (paired := {n: r for n, r in results.ablations.items() if _comparable(r, reference)}):
        listed = "; ".join(f"{name} {difference(record.average, reference.average)}" for name, record in paired.items())
        parts.append(picture(gains_picture(paired, reference), f"By how many points {REFERENCE} is better: {listed}"))
        explained = f"Right of zero: {REFERENCE} as it is does better than with this change. " + (
            "A hollow dot: the 95% interval holds zero." if len(results.seeds) > 1 else "One seed: no intervals."
        )
        parts.append(tag("p", explained, class_="note"))
    for group in dict.fromkeys(record.group for record in results.ablations.values()):
        members = {name: record for name, record in results.ablations.items() if record.group == group}
        table = method_table(({} if reference is None else {REFERENCE: reference}) | members, reference)
        parts.append(tag("div", tag("h3", group or "other"), table, class_="group"))
    return join(parts)


def routing(methods: Mapping[str, Record]) -> Html:
    """Which experts the tokens of each test set reach."""
    parts = []
    for name in ROUTED:
        if name in methods and (shares := mean_routing(methods[name])):
            experts = methods[name].expert_names
            most = [(test, layers.mean(0)) for test, layers in shares.items()]
            words = "; ".join(f"{test}: most to {experts[share.argmax()]}, {share.max():.2f}" for test, share in most)
            alt = f"Share of tokens at each expert, method {name}. {words}"
            parts += [tag("h3", name), picture(routing_picture(methods[name]), alt)]
    if parts:
        note = "Share of the tokens whose most likely expert is the column's, mean over the seeds; a row sums to one. "
        note += "Where several layers decide, they are counted from the lowest."
        parts.append(tag("p", note, class_="note"))
    return join(parts)


def proxies(projection: Projection) -> Html:
    """Proxies against private data, client by client: the counterpart of Figure 2 of the paper."""
    parts = []
    for name, projected in projection.clients.items():
        chosen = {"random": projected.random, "relevance": projected.relevance, "dpp": projected.dpp}
        counts = ", ".join(f"{len(points)} by {selection}" for selection, points in chosen.items())
        alt = f"Client {name}: {len(projected.private)} private samples in grey, and proxies in colour: {counts}"
        parts += [tag("h3", name), picture(proxies_picture(projected.private, chosen), alt)]
    if parts:
        note = "Grey: the client's private samples. In colour: its proxies, as each way of selection chooses them (t-SNE)."
        parts.append(tag("p", note, class_="note"))
    return join(parts)


def sent(clients: Mapping[str, Sequence[Sent]]) -> Html:
    """Every array that a client sent, with the LoRA matrices folded."""
    if not clients:
        return Html()
    parts = [tag("p", f"Method {REFERENCE}, first seed. Point at a hash to see all of it.", class_="note")]
    for client, arrays in clients.items():
        lora = [array for array in arrays if ".lora_" in array.name]
        others = [array for array in arrays if ".lora_" not in array.name]
        total = f"{len(arrays)} arrays, {sum(array.bytes for array in arrays):,} bytes"
        shown = [tag("h3", client, tag("span", total, class_="sum"))]
        shown += [array_table(others)] if others else []
        if lora:
            summary = f"the expert: {len(lora)} LoRA matrices, {sum(array.bytes for array in lora):,} bytes"
            shown.append(tag("details", tag("summary", summary), array_table(lora)))
        parts.append(tag("div", *shown, class_="group"))
    return join(parts)


def method_table(records: Mapping[str, Record], reference: Record | None) -> Html:
    """Accuracies, the paired difference to the reference, and the share of tokens at experts of their own domain."""
    tests = list(dict.fromkeys(test for record in records.values() for test in record.domains))
    columns: dict[str, Mapping[str, str]] = {
        "average": _accuracies(records, {name: record.average for name, record in records.items()}, 2)
    }
    if reference is not None:
        columns[f"{REFERENCE} is better by"] = {
            name: difference(record.average, reference.average)
            for name, record in records.items()
            if record is not reference and _comparable(record, reference)
        }
        others = {name: samples_text(record, reference) for name, record in records.items() if record is not reference}
        columns |= {"on other samples": others} if any(others.values()) else {}
    columns |= {
        test: _accuracies(records, {name: r.domains[test] for name, r in records.items() if test in r.domains}, 1, spread=False)
        for test in tests
    }
    columns["public, held out"] = _accuracies(records, {name: record.public for name, record in records.items()}, 1)
    columns["own expert"] = {name: _mean(record.own_expert_share, 3) for name, record in records.items()}
    return record_table(records, columns, reference)


def cost_table(records: Mapping[str, Record]) -> Html:
    """Bytes as means over the seeds, CPU times as their minima."""
    columns = {
        "bytes up, a client": {name: _mean(record.bytes_up, 0) for name, record in records.items()},
        "bytes down, a client": {name: _mean(record.bytes_down, 0) for name, record in records.items()},
        "unification, CPU s": {name: _least(record.unify_seconds, 1) for name, record in records.items()},
        "inference, CPU ms an image": {name: _least(record.inference_ms, 2) for name, record in records.items()},
    }
    return record_table(records, columns, records.get(REFERENCE), about=False)


def record_table(
    records: Mapping[str, Record], columns: Mapping[str, Mapping[str, str]], reference: Record | None, about: bool = True
) -> Html:
    """A row for each method, the reference's marked, and cells by column and method."""
    rows = []
    for name, record in records.items():
        title = [tag("span", name, class_="name")]
        title += [] if record.private else [tag("span", "pools private data", class_="pools")]
        title += [tag("span", record.about, class_="about")] if about else []
        cells = [tag("td", column.get(name) or "–") for column in columns.values()]
        rows.append(tag("tr", tag("th", *title, scope="row"), *cells, class_="reference" if record is reference else ""))
    return table(["method", *columns], rows)


def picture(png: bytes, alt: str) -> Html:
    """A drawing of :mod:`metamoe.simulations.benchmark.pictures` in the page itself."""
    with Image.open(BytesIO(png)) as image:
        return _embedded(png, round(image.width * PIXELS_PER_INCH / DPI), alt)


def png_picture(image: Image.Image, alt: str) -> Html:
    """An image in the page itself, pixel by pixel."""
    stream = BytesIO()
    image.save(stream, "PNG")
    return _embedded(stream.getvalue(), image.width, alt)


def _embedded(png: bytes, width: int, alt: str) -> Html:
    data = base64.b64encode(png).decode()
    return tag("div", Html(f'<img src="data:image/png;base64,{data}" width="{width}" alt="{html.escape(alt)}">'), class_="wide")


def _accuracies(
    records: Mapping[str, Record], values: Mapping[str, Sequence[float]], digits: int, spread: bool = True
) -> dict[str, Html]:
    """Cells of one column; the best of those methods in which no private sample leaves a client stands out."""
    texts = {name: f"{mean_and_deviation(of)[0]:.{digits}f}" for name, of in values.items()}
    rivals = {name: float(text) for name, text in texts.items() if records[name].private and name != ORACLE}
    best = max(rivals.values(), default=math.nan)
    cells = {}
    for name, text in texts.items():
        mean = tag("strong", text) if rivals.get(name) == best else text
        deviation = f" ± {mean_and_deviation(values[name])[1]:.{digits}f}" if spread and len(values[name]) > 1 else ""
        cells[name] = join([mean, deviation])
    return cells


def _mean(values: Iterable[float | None], digits: int) -> str:
    """Mean of the values there are, as text; empty if there are none."""
    known = [value for value in values if value is not None]
    return f"{mean_and_deviation(known)[0]:,.{digits}f}" if known else ""


def _least(values: Iterable[float | None], digits: int) -> str:
    """The smallest of the values there are, as text; empty if there are none."""
    known = [value for value in values if value is not None]
    return f"{min(known):,.{digits}f}" if known else ""


def _comparable(record: Record, reference: Record) -> bool:
    """Whether both averages are over the same test sets."""
    return set(record.domains) == set(reference.domains)
