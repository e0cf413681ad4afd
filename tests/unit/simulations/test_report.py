"""The page of a benchmark: its numbers, its pictures, and what must not get into it."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from metamoe.common.errors import InputFileError
from metamoe.simulations.benchmark.pictures import (
    accuracy_picture,
    gains_picture,
    mean_interval,
    mean_routing,
    proxies_picture,
    routing_picture,
)
from metamoe.simulations.benchmark.report import write_report
from metamoe.simulations.benchmark.tables import (
    FORMAT,
    Record,
    Results,
    Sent,
    mean_and_deviation,
)

DOMAINS = ["digits", "greek", "arrows"]
METAMOE = [88.0, 90.0, 87.0, 91.0, 89.0]
BTM = [80.0, 83.0, 78.0, 85.0, 84.0]
POOLED = [92.0, 94.0, 91.0, 93.0, 92.0]
EVIL = "<script>alert('x')</script>"


def record(average: Sequence[float], routed: int = 0, domains: Sequence[str] = DOMAINS, **changes: Any) -> Record:
    """A record whose test sets all have the average's accuracies, and whose router, if any, decides in ``routed`` layers."""
    count = len(average)
    experts = [*domains, "seed"]
    shares = {d: [[0.7 if name == d else 0.3 / len(domains) for name in experts]] * routed for d in domains}
    values: dict[str, Any] = {
        "about": "about it",
        "private": True,
        "average": list(average),
        "domains": {domain: list(average) for domain in domains},
        "public": [30.0] * count,
        "own_expert_share": [0.7 if routed else None] * count,
        "bytes_up": [249_840.0] * count,
        "bytes_down": [1_900_000.0] * count,
        "unify_seconds": [31.5 if routed else None] * count,
        "inference_ms": [2.5] * count,
        "routing": [shares if routed else None] * count,
        "expert_names": experts if routed else [],
    }
    return Record(**values | changes)


def arrays(client: str) -> list[Sent]:
    lora = [(f"layers.1.fc1.lora_{side}.weight", "float16", (16, 128), 4_096) for side in "AB"]
    others = [("client", "int64", (), 8), ("seed-routing-vector", "float32", (128,), 512)]
    return [
        Sent(name=name, dtype=dtype, shape=shape, bytes=size, sha256=f"{number}{client}".encode().hex().ljust(64, "0"))
        for number, (name, dtype, shape, size) in enumerate([*others, *lora])
    ]


def results(clients: Sequence[str] = DOMAINS, **changes: Any) -> Results:
    """A small benchmark with everything in it: five seeds, five methods, two groups of ablations."""
    values: dict[str, Any] = {
        "format": FORMAT,
        "command": "metamoe benchmark --preset glyphs",
        "date": "2026-11-24",
        "version": "0.2.0",
        "part_seconds": 7_500.0,
        "preset": "glyphs",
        "settings": "[router]\ntop-k = 2\n",
        "evaluated_on": "test",
        "seeds": [0, 1, 2, 3, 4],
        "clients": list(clients),
        "methods": {
            "btm": record(BTM),
            "oracle": record([value + 1 for value in METAMOE]),
            "metamoe-paper": record([70.0, 71.0, 69.0, 70.0, 70.0], routed=2),
            "unrestricted-moe": record(POOLED, private=False),
            "metamoe": record(METAMOE, routed=1),
        },
        "ablations": {
            "proxies: random": record(BTM, group="proxies"),
            "proxies: by relevance alone": record([value - 0.5 for value in METAMOE], group="proxies"),
            "top-k: top-1": record([value - 30 for value in METAMOE], group="top-k"),
        },
        "sent": {client: arrays(client) for client in clients},
    }
    return Results(**values | changes)


def projection(clients: Sequence[str] = DOMAINS) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ways = ("private", "random", "relevance", "dpp")
    return {"clients": {client: {way: rng.normal(size=(20, 2)).tolist() for way in ways} for client in clients}}


def page(folder: Path, content: Results, projected: dict[str, Any] | None = None) -> str:
    (folder / "results.json").write_text(content.model_dump_json())
    if projected is not None:
        (folder / "projection.json").write_text(json.dumps(projected))
    file = write_report(folder)
    assert file == folder / "report.html"
    return file.read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(tmp_path_factory.mktemp("full"), results(), projection())


class Page(HTMLParser):
    """Every element of a page with its attributes; the text of headings, and of tables by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        match tag:
            case "h2" | "h3":
                self.headings.append("")
                self._open = "heading"
            case "table":
                self.tables.append([])
            case "tr":
                self.tables[-1].append([])
            case "td" | "th":
                self.tables[-1][-1].append("")
                self._open = "cell"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("h2", "h3", "td", "th"):
            self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "heading":
            self.headings[-1] += data
        elif self._open == "cell":
            self.tables[-1][-1][-1] += data

    @property
    def images(self) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag == "img"]


def decoded(source: str) -> Image.Image:
    assert source.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
    image.load()
    return image.convert("RGB")


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in image.getcolors(image.width * image.height) or []}


def without_pictures(text: str) -> str:
    return re.sub(r"data:image/png;base64,[^\"]*", "", text)


def test_mean_and_deviation_by_hand() -> None:
    # Squared deviations from 82: 4, 1, 16, 9, 4, that is 34 over 4 degrees of freedom.
    assert mean_and_deviation(BTM) == pytest.approx((82, math.sqrt(8.5)))
    assert mean_and_deviation([3.5]) == (3.5, 0.0)


def test_interval_of_a_mean_by_hand() -> None:
    half = 2.7764 * math.sqrt(8.5) / math.sqrt(5)
    assert mean_interval(BTM) == pytest.approx((82, 82 - half, 82 + half), abs=1e-4)


def test_mean_routing_is_over_the_seeds_that_have_one() -> None:
    seeds = [{"digits": [[0.75, 0.25]]}, None, {"digits": [[0.25, 0.75]]}, {"digits": [[0.5, 0.5]]}]
    routed = record([88.0] * 4, routing=seeds, expert_names=["digits", "seed"])
    assert {test: shares.tolist() for test, shares in mean_routing(routed).items()} == {"digits": [[0.5, 0.5]]}
    assert mean_routing(record([88.0])) == {}


def test_every_picture_is_there_and_shows_something(full: str) -> None:
    images = Page(full).images
    # Accuracy, gains, routing of two methods, and proxies of three clients.
    assert len(images) == 7
    alternatives = [image["alt"] for image in images]
    assert len(set(alternatives)) == 7
    assert "btm 82.0" in alternatives[0]
    assert "metamoe 89.0" in alternatives[0]
    assert "proxies: random +7.00 [+5.04, +8.96]" in alternatives[1]
    assert "method metamoe. digits: most to digits, 0.70" in alternatives[2]
    assert "metamoe-paper" in alternatives[3]
    assert [client in alt for client, alt in zip(DOMAINS, alternatives[4:], strict=True)] == [True] * 3
    for image in images:
        picture = decoded(image["src"])
        assert picture.width > 500
        assert picture.height > 300
        assert len(colours(picture)) > 50


def test_pictures_show_the_data() -> None:
    blue, orange, vermilion = (0, 114, 178), (230, 159, 0), (213, 94, 0)

    def shown(png: bytes) -> set[tuple[int, int, int]]:
        return colours(decoded("data:image/png;base64," + base64.b64encode(png).decode()))

    methods = results().methods
    assert {blue, vermilion} <= shown(accuracy_picture(methods, "test"))
    others = {name: method for name, method in methods.items() if name not in ("metamoe", "unrestricted-moe")}
    assert not {blue, vermilion} & shown(accuracy_picture(others, "test"))
    assert blue in shown(gains_picture(results().ablations, methods["metamoe"]))
    # The ends of the colour map are there where a share is 0 and 1.
    sure = record([90.0], routing=[{"digits": [[1.0, 0.0]]}], expert_names=["digits", "seed"])
    assert {(8, 48, 107), (247, 251, 255)} <= shown(routing_picture(sure))
    unsure = record([90.0], routing=[{"digits": [[0.5, 0.5]]}], expert_names=["digits", "seed"])
    assert not {(8, 48, 107), (247, 251, 255)} & shown(routing_picture(unsure))
    ways = {way: [(0.0, 0.0), (1.0, 2.0)] for way in ("random", "relevance", "dpp")}
    drawn = shown(proxies_picture([(0.5, 0.5)], ways))
    assert all(any(math.dist(colour, c) < 60 for c in drawn) for colour in (blue, orange))


def test_numbers_beside_the_dots_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    text = Axes.text

    def note(axes: Axes, x: float, y: float, s: str, *rest: Any, **more: Any) -> Any:
        written.append(s)
        return text(axes, x, y, s, *rest, **more)

    monkeypatch.setattr(Axes, "text", note)
    accuracy_picture({"btm": record(BTM), "metamoe": record(METAMOE)}, "validation")
    gains_picture({"a: b": record(BTM, group="a")}, record(METAMOE))
    accuracy_picture({"btm": record([82.0])}, "validation")
    gains_picture({"a: b": record([82.0], group="a")}, record([81.0]))
    half = 2.7764 * math.sqrt(2.5) / math.sqrt(5)
    assert written == [
        "82.00  [78.38, 85.62]",
        f"89.00  [{89 - half:.2f}, {89 + half:.2f}]",
        *("+7.00  [+5.04, +8.96]", "a"),
        "82.00",
        *("-1.00", "a"),
    ]


def test_long_names_are_cut_in_pictures_and_whole_in_tables(tmp_path: Path) -> None:
    long = "x" * 500
    text = page(tmp_path, results(methods={long: record(BTM)}, ablations={}))
    assert decoded(Page(text).images[0]["src"]).width < 2_000
    assert Page(text).tables[0][1][0].startswith(long)


def test_the_main_table_by_hand(full: str) -> None:
    table = Page(full).tables[0]
    assert table[0] == ["method", "average", "metamoe is better by", *DOMAINS, "public, held out", "own expert"]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["btmabout it"] == ["82.00 ± 2.92", "+7.00 [+5.04, +8.96]", "82.0", "82.0", "82.0", "30.0 ± 0.0", "–"]
    assert rows["metamoeabout it"] == ["89.00 ± 1.58", "–", "89.0", "89.0", "89.0", "30.0 ± 0.0", "0.700"]
    assert rows["unrestricted-moepools private dataabout it"][0] == "92.40 ± 1.14"
    # The best of what can be used: neither what pools private data, nor the oracle.
    assert "<strong>89.00</strong>" in full
    assert "<strong>92.40</strong>" not in full
    assert "<strong>90.00</strong>" not in full
    assert full.count('<tr class="reference">') == 4


def test_the_cost_table_and_what_was_run(full: str) -> None:
    costs = {row[0]: row[1:] for row in Page(full).tables[1][1:]}
    assert costs["metamoe"] == ["249,840", "1,900,000", "31.5", "2.50"]
    assert costs["btm"] == ["249,840", "1,900,000", "–", "2.50"]
    facts = ["metamoe benchmark --preset glyphs", "2026-11-24", "0.2.0", "0, 1, 2, 3, 4", "digits, greek, arrows", "2 h 5 min"]
    assert all(f">{fact}</" in full for fact in facts)
    assert "<pre>[router]\ntop-k = 2\n</pre></details>" in full


def test_each_group_of_ablations_has_a_table_that_starts_with_metamoe(full: str) -> None:
    parsed = Page(full)
    assert [heading for heading in parsed.headings if heading in ("proxies", "top-k")] == ["proxies", "top-k"]
    proxies, top_k = parsed.tables[2:4]
    assert [row[0].removesuffix("about it") for row in proxies[1:]] == ["metamoe", *list(results().ablations)[:2]]
    assert [row[0].removesuffix("about it") for row in top_k[1:]] == ["metamoe", "top-k: top-1"]
    assert [row[2] for row in proxies[1:]] == ["–", "+7.00 [+5.04, +8.96]", "+0.50 [+0.50, +0.50]"]


def test_what_each_client_sent(full: str) -> None:
    parsed = Page(full)
    assert "digits4 arrays, 8,712 bytes" in parsed.headings
    assert "the expert: 2 LoRA matrices, 8,192 bytes" in full
    plain, lora = parsed.tables[4:6]
    hashes = [sent.sha256 for sent in arrays("digits")]
    assert plain[1:] == [
        ["client", "int64", "scalar", "8", hashes[0][:12] + "…"],
        ["seed-routing-vector", "float32", "128", "512", hashes[1][:12] + "…"],
    ]
    assert lora[1][:4] == ["layers.1.fc1.lora_A.weight", "float16", "16 × 128", "4,096"]
    titles = [attributes.get("title") for tag, attributes in parsed.elements if tag == "code"]
    assert set(hashes) <= set(titles)


def test_the_page_needs_nothing_else(full: str) -> None:
    text = without_pictures(full)
    assert not re.search(r"https?:|//|url\(|@import|<link|<script|<iframe", text)
    assert set(re.findall(r"src=\"([^\"]*)\"", text)) == {""}
    assert "default-src 'none'" in text


def test_the_same_results_make_the_same_page(full: str, tmp_path: Path) -> None:
    assert page(tmp_path, results(), projection()) == full


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    spoilt = Sent(name=EVIL, dtype=EVIL, shape=(1,), bytes=8, sha256='" onload="x')
    ours = results(clients=[EVIL, '" onload="x', "$\\frac{$"], sent={EVIL: [spoilt]})
    nasty = ours.methods | {EVIL: record(BTM, about=EVIL), "$\\frac{$": record(BTM), "a$b\\$": record(BTM, private=False)}
    named = {name: method.model_copy(update={"group": EVIL}) for name, method in ours.ablations.items()}
    routed = record(METAMOE, routed=2, domains=[EVIL, '" onload="x', "$\\frac{$"])
    # A metamoe with test sets of its own is comparable to none of the others, so that there are two benchmarks.
    for number, methods in enumerate([nasty, {"metamoe": routed}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        fields = ("command", "date", "version", "preset", "settings")
        content = ours.model_copy(update={"methods": methods, "ablations": named} | dict.fromkeys(fields, EVIL))
        text = page(folder, content, projection(ours.clients))
        parsed = Page(text)
        assert "script" not in {tag for tag, _ in parsed.elements}
        assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
        assert "&lt;script&gt;" in text
        assert f"{EVIL}1 arrays, 8 bytes" in parsed.headings
        assert any('" onload="x' in image["alt"] for image in parsed.images)


def test_one_seed_has_no_intervals(tmp_path: Path) -> None:
    methods = {"btm": record([82.0]), "metamoe": record([89.0])}
    text = page(tmp_path, results(seeds=[0], methods=methods, ablations={}, sent={}, settings=""))
    parsed = Page(text)
    rows = [row[1:] for row in parsed.tables[0][1:]]
    assert rows[0] == ["82.00", "+7.00", "82.0", "82.0", "82.0", "30.0", "–"]
    body = without_pictures(text).partition("</head>")[2]
    assert not re.search(r"±|\[|\binf\b|\bnan\b", body)
    # What this run has not is not there, and the page says so.
    assert parsed.headings == ["Accuracy", "What it costs"]
    assert len(parsed.images) == 1
    absent = body[body.index("Not part of this run") :]
    for missing in ("ablations", "the routing of metamoe", "projection.json", "what each client sent"):
        assert missing in absent


def test_gains_with_one_seed_have_no_intervals(tmp_path: Path) -> None:
    changed = {"top-k: top-1": record([60.0], group="top-k")}
    text = page(tmp_path, results(seeds=[0], methods={"metamoe": record([89.0])}, ablations=changed))
    assert Page(text).images[1]["alt"].endswith("top-k: top-1 +29.00")
    assert "One seed: no intervals." in text


@pytest.mark.parametrize("count", [1, 9])
def test_any_number_of_clients(count: int, tmp_path: Path) -> None:
    clients = [f"{DOMAINS[k % 3]}-{k // 3 + 1}" for k in range(count)]
    methods = {name: record(METAMOE, routed=layers, domains=clients) for name, layers in (("metamoe", 1), ("metamoe-paper", 3))}
    parsed = Page(page(tmp_path, results(clients, methods=methods, ablations={}), projection(clients)))
    assert len(parsed.images) == 3 + count
    assert parsed.tables[0][0][3 : 3 + count] == clients
    assert decoded(parsed.images[2]["src"]).height > decoded(parsed.images[1]["src"]).height


def test_without_metamoe_there_are_no_differences(tmp_path: Path) -> None:
    text = page(tmp_path, results(methods={"btm": record(BTM)}))
    parsed = Page(text)
    assert "better" not in without_pictures(text)
    assert "the method metamoe" in text
    assert parsed.headings[:5] == ["Accuracy", "What it costs", "Ablations", "proxies", "top-k"]
    assert [row[0] for row in parsed.tables[3]] == ["method", "top-k: top-1about it"]
    assert len(parsed.images) == 1
    assert "<strong>82.00</strong>" in text


def test_averages_over_other_test_sets_are_not_compared(tmp_path: Path) -> None:
    blurred = record(BTM, domains=["digits, blur"], group="corruption")
    parsed = Page(page(tmp_path, results(ablations={"corruption: blur": blurred})))
    header, _, row = parsed.tables[2]
    assert dict(zip(header, row, strict=True)) | {"method": "", "average": ""} == {
        **dict.fromkeys(["method", "average"], ""),
        **dict.fromkeys(["metamoe is better by", *DOMAINS, "own expert"], "–"),
        "digits, blur": "82.0",
        "public, held out": "30.0 ± 0.0",
    }
    assert not any("better" in image["alt"] for image in parsed.images)


def with_client(**changes: Any) -> dict[str, Any]:
    return {"clients": {"digits": projection()["clients"]["digits"] | changes}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        (json.dumps({"clients": {}, "more": 1}), "more"),
        (json.dumps(with_client(dpp=[])), "clients.digits.dpp"),
        (json.dumps(with_client(dpp=[[1, 2, 3]])), "clients.digits.dpp.0"),
        (json.dumps(with_client(dpp=[[1, math.nan]])), "clients.digits.dpp.0.1"),
        (json.dumps(with_client(kdpp=[[1, 2]])), "clients.digits.kdpp"),
        (json.dumps(projection(["latin"])), "'latin'"),
    ],
)
def test_a_projection_that_is_none_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(results().model_dump_json())
    (tmp_path / "projection.json").write_text(content)
    with pytest.raises(InputFileError, match=r"projection\.json") as refused:
        write_report(tmp_path)
    assert says in str(refused.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _folder: None,
        lambda folder: (folder / "results.json").write_text("{"),
        lambda folder: (folder / "results.json").write_text('{"preset": "glyphs", "accuracy": {}}'),
        lambda folder: (folder / "results.json").write_text(results(format=FORMAT + 1).model_dump_json()),
        lambda folder: (folder / "results.json").mkdir(),
    ],
)
def test_results_that_are_none_are_refused(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(InputFileError, match=r"results\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_browser_shows_the_page(full: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")

    def run(text: str, *options: str) -> str:
        (tmp_path / "page.html").write_text(text)
        always = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [browser, *always, "--virtual-time-budget=5000", *options, (tmp_path / "page.html").as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout

    assert run(full, "--dump-dom").count("<img ") == 7
    # The page itself allows no script; the copy still loads no more than the page does.
    asks = "[[...document.images].map(i => i.naturalWidth), document.documentElement.scrollWidth, innerWidth]"
    copy = full.replace("style-src", "script-src 'unsafe-inline'; style-src", 1)
    copy += f"<script>addEventListener('load', () => document.title = JSON.stringify({asks}))</script>"
    for width in (500, 1200):
        dom = run(copy, "--dump-dom", f"--window-size={width},900")
        found = re.search(r"<title>(.*)</title>", dom)
        assert found is not None
        images, content, window = json.loads(found[1])
        assert len(images) == 7
        assert min(images) > 500
        # What is too wide scrolls in its own place.
        assert content <= window == width
    run(full, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1200,2000")
    with Image.open(tmp_path / "shot.png") as shot:
        # The title, and the row of metamoe in picture and table, among white.
        seen = colours(shot.convert("RGB"))
        assert {(255, 255, 255), (34, 38, 43), (230, 241, 249)} <= seen
        assert len(seen) > 200
