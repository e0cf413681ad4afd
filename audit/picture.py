"""The picture at the head of an audit page: what went to the server, what it can reveal, what the checks say, what was spent.

Colour never stands alone: what it says is written beside it.
"""

from collections.abc import Sequence
from itertools import groupby
from math import log10

from metamoe.audit.page import Html, join, tag
from metamoe.common.audit.entries import Intent, Refusal
from metamoe.common.audit.policy import epsilon_of
from metamoe.common.audit.terms import statistics
from metamoe.common.audit.verify import Checked, Finding, Verdict
from metamoe.common.audit.words import privacy_of, released

_WIDTH, _ROW = 760, 68
_REVEALS = {
    "nothing": ("nothing of the data", "#5a626c"),
    "noise": ("with noise, under an epsilon", "#1b7f4b"),
    "mean": ("a statistic of all samples", "#0062a0"),
    "samples": ("to some degree single samples", "#a04000"),
}
_OF_SAMPLES = ("expert", "relevance-classifier", "routing-vectors")
_CHECKS = {
    Verdict.TAMPERED: "hashes and signatures",
    Verdict.DISAGREE: "agreement with the server's ledger",
    Verdict.VIOLATION: "the policy",
    Verdict.OVER_BUDGET: "the budget",
    Verdict.INCOMPLETE: "completeness",
}


def flow(client: str, intents: Sequence[Intent]) -> Html:
    """An arrow from the client to the server for each kind of artifact of each stage: its width goes by the logarithm of the
    bytes, its colour, and the words on it, by what the artifact can reveal.
    """
    rows = []
    for stage, of_stage in groupby(sorted(intents, key=lambda intent: _stages(intent.stage)), key=lambda intent: intent.stage):
        sent = list(of_stage)
        privacy = privacy_of(sent)
        for kind, arrays in released(sent).items():
            exact = kind in privacy and privacy[kind].exact
            reveals = "nothing" if kind not in privacy else "noise" if not exact else "mean"
            if exact and kind in _OF_SAMPLES:
                reveals = "samples"
            rows.append((stage, kind, sum(array.bytes for array in arrays), reveals))
    height = _ROW * max(len(rows), 1) + 20
    said = "; ".join(f"{stage}: {kind}, {size:,} bytes, {_REVEALS[what][0]}" for stage, kind, size, what in rows)
    shapes = [
        tag("title", f"What {client} sent to the server: {said or 'nothing'}"),
        _box(4, height, client),
        _box(_WIDTH - 124, height, "server"),
        *[_arrow(20 + number * _ROW, *row) for number, row in enumerate(rows)],
    ]
    svg = tag("svg", *shapes, viewBox=f"0 0 {_WIDTH} {height}", role="img", class_="picture")
    return tag("div", svg, class_="wide")


def checks(findings: Sequence[Finding], compared: bool) -> Html:
    """The state of each check, as a mark and a word."""
    items = []
    for verdict, what in _CHECKS.items():
        wrong = sum(finding.verdict is verdict for finding in findings)
        state = f"✗ {wrong} found" if wrong else "✓ holds"
        if verdict is Verdict.DISAGREE and not compared:
            state = "– not compared"
        items.append(tag("div", tag("dt", what), tag("dd", tag("strong", state))))
    return tag("dl", *items, class_="checks")


def spent(client: Checked) -> Html:
    """What has left of what may over all runs, as bars: different statistics of each kind, and the epsilon of a budget."""
    policies = list(client.policies.values())
    if not policies:
        return Html("")
    bars, policy = [], policies[-1]
    if most := policy.limits.max_distinct_statistics:
        for kind, different in statistics(client.of(Intent), noise_counts=policy.budget is None).items():
            bars.append(_bar(f"{kind}: {len(different)} of {most} different ones", len(different) / most))
    if policy.budget:
        epsilon = epsilon_of([each for intent in client.of(Intent) for each in intent.spent], policy.budget.delta)
        words = f"privacy budget: epsilon {epsilon:.2f} of {policy.budget.epsilon:g} at delta {policy.budget.delta:g}"
        bars.append(_bar(words, epsilon / policy.budget.epsilon))
    return join(bars)


def time_line(client: Checked) -> Html:
    """When something left, or was refused, run by run."""
    items = []
    for run in client.runs:
        events = [
            f"{line.time.replace('T', ' ').rstrip('Z')} {line.entry.stage}{' refused' * isinstance(line.entry, Refusal)}"
            for line, _ in client.lines
            if isinstance(line.entry, Intent | Refusal) and line.entry.run == run
        ]
        items.append(tag("li", tag("strong", f"run {run[:8]}"), ": " + (" → ".join(events) or "nothing left")))
    return tag("ol", *items)


def _stages(stage: str) -> int:
    return ("profile", "expert", "deliver").index(stage)


def _box(left: int, height: int, words: str) -> Html:
    middle = str(left + 60)
    box = tag("rect", x=str(left), y="4", width="120", height=str(height - 8), rx="6", fill="#f5f6f8", stroke="#22262b")
    return join([box, tag("text", words, x=middle, y=str(height // 2 + 5), **{"text-anchor": "middle", "font-weight": "600"})])


def _arrow(top: int, stage: str, kind: str, size: int, reveals: str) -> Html:
    words, colour = _REVEALS[reveals]
    line = str(top + 34)
    thick = f"{1 + log10(max(size, 1)):.1f}"
    shaft = tag("line", x1="134", x2=str(_WIDTH - 144), y1=line, y2=line, stroke=colour, **{"stroke-width": thick})
    points = f"{_WIDTH - 146},{top + 26} {_WIDTH - 128},{top + 34} {_WIDTH - 146},{top + 42}"
    head = tag("polygon", points=points, fill=colour)
    above = tag("text", f"{stage}: {kind}, {size:,} bytes", x="140", y=str(top + 18))
    return join([shaft, head, above, tag("text", words, x="140", y=str(top + 54), fill=colour, **{"font-size": "13"})])


def _bar(words: str, share: float) -> Html:
    full = f"{min(max(share, 0.0), 1.0) * 300:.0f}"
    colour = "#a04000" if share >= 1 else "#0062a0"
    frame = tag("rect", width="300", height="14", fill="none", stroke="#22262b", x="1", y="1")
    svg = tag("svg", frame, tag("rect", width=full, height="14", fill=colour, x="1", y="1"), viewBox="0 0 302 16", class_="bar")
    return tag("p", svg, " " + words)
