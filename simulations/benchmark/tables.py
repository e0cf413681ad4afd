"""A benchmark's results: their form, their statistics, and the Markdown tables made of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metamoe.common.errors import InputFileError, first_problem

REFERENCE = "metamoe"
RESULTS = "results.json"
FORMAT = 3

_RESAMPLES = 4_000

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Bits = Annotated[str, Field(pattern="^[01]+$")]


class Strict(BaseModel):
    """A part of results.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Sent(Strict):
    """One array that a client sent."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str


class Record(Strict):
    """What a method reached: every list has one entry for each seed, in their order."""

    about: str
    private: bool = Field(description="no private sample leaves a client")
    group: str = Field("", description="the question that an ablation answers")
    average: list[Percent] = Field(description="mean over the test sets, %")
    domains: dict[str, list[Percent]] = Field(description="accuracy on each test set, %")
    right: dict[str, list[Bits]] = Field({}, description="for each test set and sample, 1 if it was answered right, else 0")
    public: list[Percent] = Field(description="accuracy on the held-out public samples, %")
    own_expert_share: list[float | None] = Field(description="share of the tokens that reach an expert of their own domain")
    bytes_up: list[Amount] = Field(description="bytes that a client sends, mean over the clients")
    bytes_down: list[Amount] = Field(description="bytes that a client receives, mean over the clients")
    unify_seconds: list[Amount | None] = Field(description="CPU seconds of stage 3")
    inference_ms: list[Amount] = Field(description="CPU milliseconds for one image")
    routing: list[dict[str, list[list[float]]] | None] = Field(
        description="for each test set and each layer that decides, the share of tokens at each expert"
    )
    expert_names: list[str] = Field(description="what routing chooses among, in its order")


class Results(Strict):
    """Contents of a benchmark's results.json."""

    format: int
    command: str
    date: str
    version: str
    part_seconds: float = Field(description="time of all parts, a method with a seed each, added up")
    preset: str
    settings: str = Field(description="every setting, as TOML")
    evaluated_on: Literal["validation", "test"]
    seeds: list[int]
    clients: list[str]
    methods: dict[str, Record]
    ablations: dict[str, Record]
    sent: dict[str, list[Sent]] = Field(description="what each client sent, method metamoe, first seed")

    @model_validator(mode="after")
    def _check(self) -> "Results":
        for name, record in [*self.methods.items(), *self.ablations.items()]:
            lists: list[Sequence[object]] = [record.average, record.public, record.own_expert_share, record.routing]
            lists += [record.bytes_up, record.bytes_down, record.unify_seconds, record.inference_ms, *record.domains.values()]
            lists += record.right.values()
            if not self.seeds or any(len(values) != len(self.seeds) for values in lists):
                raise ValueError(f"{name!r} has not one value for each of {len(self.seeds)} seeds")
            if any(len({len(bits) for bits in seeds}) != 1 for seeds in record.right.values()):
                raise ValueError(f"{name!r} has not answers to as many samples of a test set with every seed")
            layers = [rows for routing in record.routing if routing for rows in routing.values()]
            shapes = {(len(rows), len(row)) for rows in layers for row in rows}
            if layers and (len(shapes) != 1 or shapes.pop()[1] != len(record.expert_names)):
                raise ValueError(f"{name!r} has routing that is not layers by experts")
        return self


def read_results(folder: Path) -> Results:
    """The results in a benchmark's folder.

    Raises:
        InputFileError: there are none, or they are not a benchmark's.
    """
    file = folder / RESULTS
    try:
        results = Results.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputFileError(f"{folder} holds no {RESULTS}; give a folder that 'metamoe benchmark' wrote") from error
    except ValidationError as error:
        raise InputFileError(f"{file} is not a benchmark's: {first_problem(error)}") from error
    if results.format != FORMAT:
        raise InputFileError(f"{file} has format {results.format}; this version reads {FORMAT}")
    return results


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is zero for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ``reference - values``, seed by seed, and its 95% interval by Student's t (infinite for one seed)."""
    differences = [b - a for a, b in zip(values, reference, strict=True)]
    mean, deviation = mean_and_deviation(differences)
    if len(differences) == 1:
        return mean, -math.inf, math.inf
    # Not before it is needed: a run's own table is made by this file too, and has no intervals.
    from scipy.stats import t

    half = float(t.ppf(0.975, len(differences) - 1)) * deviation / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def interval_over_samples(values: Record, reference: Record) -> tuple[float, float] | None:
    """The 95% interval of the mean of ``reference - values`` for other test samples, with the same seeds: percentiles of a
    bootstrap over the samples of each test set, each with its mean over the seeds. None where single answers were not kept.
    """
    if not values.right or {test: len(bits[0]) for test, bits in values.right.items()} != {
        test: len(bits[0]) for test, bits in reference.right.items()
    }:
        return None
    rng, means = np.random.default_rng(0), []
    for test, bits in values.right.items():
        better = _mean_right(reference.right[test]) - _mean_right(bits)
        # How often each sample is drawn, in place of the draws themselves.
        times = rng.multinomial(len(better), np.full(len(better), 1 / len(better)), size=_RESAMPLES)
        means.append(100 * times @ better / len(better))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def _mean_right(seeds: Sequence[str]) -> np.ndarray:
    """The share of seeds that answered each sample right, float64 [n]."""
    return np.mean([np.frombuffer(bits.encode(), np.uint8) - ord("0") for bits in seeds], axis=0)


def markdown(results: Results) -> str:
    """The tables as Markdown: the methods, then each group of ablations."""
    reference = results.methods.get(REFERENCE)
    lines = [
        f"## Methods, preset {results.preset}, {results.evaluated_on} data",
        "",
        *table(method_header(results.methods), method_rows(results.methods, reference)),
        "",
    ]
    lines += ["## What it costs", "", *cost_table(results.methods), ""]
    for group in dict.fromkeys(record.group for record in results.ablations.values()):
        members = {name: record for name, record in results.ablations.items() if record.group == group}
        if reference is not None:
            members = {f"{REFERENCE} (as above)": reference} | members
        lines += [f"## Ablation: {group}", "", *table(method_header(members), method_rows(members, reference)), ""]
    return "\n".join(lines).rstrip() + "\n"


def method_header(records: Mapping[str, Record]) -> list[str]:
    """The columns of :func:`method_rows`."""
    domains = next(iter(records.values())).domains if records else []
    return ["method", *domains, "average", "metamoe is better by", "on other samples", "public, held out", "own expert"]


def method_rows(records: Mapping[str, Record], reference: Record | None) -> list[list[str]]:
    """Accuracies as mean and standard deviation, and the paired difference to the reference, with its interval."""
    rows = []
    for name, record in records.items():
        shares = [share for share in record.own_expert_share if share is not None]
        rows.append(
            [
                name if record.private else f"{name} (pools private data)",
                *(f"{mean_and_deviation(values)[0]:.1f}" for values in record.domains.values()),
                mean_text(record.average, 2),
                "" if reference is None or record is reference else difference(record.average, reference.average),
                "" if reference is None or record is reference else samples_text(record, reference),
                mean_text(record.public, 1),
                f"{mean_and_deviation(shares)[0]:.3f}" if shares else "",
            ]
        )
    return rows


def cost_table(records: Mapping[str, Record]) -> list[str]:
    """Bytes as means over the seeds, CPU times as their minima."""
    rows = []
    for name, record in records.items():
        seconds = [value for value in record.unify_seconds if value is not None]
        up, down = (mean_and_deviation(values)[0] for values in (record.bytes_up, record.bytes_down))
        unify = f"{min(seconds):.1f}" if seconds else ""
        rows.append([name, f"{up:,.0f}", f"{down:,.0f}", unify, f"{min(record.inference_ms):.2f}"])
    header = ["method", "bytes up, a client", "bytes down, a client", "unification, CPU s", "inference, CPU ms an image"]
    return table(header, rows)


def mean_text(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation as text; one value has no deviation."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" if len(values) == 1 else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def difference(values: Sequence[float], reference: Sequence[float]) -> str:
    """A paired difference with its interval, as text."""
    mean, low, high = paired_difference(values, reference)
    return f"{mean:+.2f}" if math.isinf(low) else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def samples_text(record: Record, reference: Record) -> str:
    """The interval of :func:`interval_over_samples` as text; empty without."""
    found = interval_over_samples(record, reference)
    return f"[{found[0]:+.2f}, {found[1]:+.2f}]" if found else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
