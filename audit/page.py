"""HTML pages of one file that need nothing else, load nothing and run nothing."""

import html
from collections.abc import Iterable, Sequence
from typing import Protocol


class Html(str):
    """Text that is HTML already. Every other text is escaped when it is put into an element."""


class SentArray(Protocol):
    """An array that was sent, as a ledger or a table has it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


def document(title: str, *content: str, refresh: int = 0) -> str:
    """A whole page under its title, which a browser reads anew after so many seconds; 0 for never."""
    again = Html(f'<meta http-equiv="refresh" content="{refresh}">') if refresh else Html()
    head = tag("head", Html(_META), again, tag("title", title), tag("style", Html(_STYLE)))
    body = tag("main", tag("h1", title), *content)
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An HTML element: children and attributes are escaped, unless they are HTML already; ``class_`` is the attribute class."""
    listed = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return Html(f"<{name}{listed}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Texts and elements one after the other."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def signature(about: str) -> Html:
    """On paper alone: lines for place, date and signature under what is signed."""
    return tag(
        "div", tag("p", about), *(tag("span", line) for line in ("Place, date", "Name", "Signature")), class_="signature"
    )


def table(header: Sequence[str], rows: Sequence[Html]) -> Html:
    """A table that scrolls where it is too wide."""
    columns = [tag("th", name, scope="col") for name in header]
    return tag("div", tag("table", tag("thead", tag("tr", *columns)), tag("tbody", *rows)), class_="wide")


def array_table(arrays: Sequence[SentArray]) -> Html:
    """Arrays as they were sent."""
    rows = []
    for array in arrays:
        shape = " × ".join(map(str, array.shape)) or "scalar"
        digest = tag("code", array.sha256[:12] + "…", title=array.sha256)
        cells = [tag("td", cell) for cell in (array.dtype, shape, f"{array.bytes:,}", digest)]
        rows.append(tag("tr", tag("th", tag("code", array.name), scope="row"), *cells))
    return table(["array", "dtype", "shape", "bytes", "SHA-256"], rows)


# The policy holds the page to its promise to load nothing and run nothing, whatever a name in the results may contain.
_META = """
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #22262b; font: 1rem/1.5 system-ui, "Liberation Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 2px solid #22262b; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; overflow-wrap: anywhere; }
code, pre { font: .85em/1.5 ui-monospace, "DejaVu Sans Mono", "Liberation Mono", monospace; }
pre { background: #f5f6f8; padding: 1rem; overflow-x: auto; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1rem; }
a { color: #0062a0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .5rem 1.5rem; margin: 0 0 1rem; }
dl div:first-child { grid-column: 1 / -1; }
dt { color: #5a626c; font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
.wide { overflow-x: auto; margin: .75rem 0; }
.note { color: #4a525b; font-size: .875rem; max-width: 75ch; }
.sum { margin-left: .75rem; color: #5a626c; font-size: .875rem; font-weight: normal; }
img { display: block; height: auto; max-width: max(100%, 29rem); }
.picture { display: block; width: 100%; min-width: 36rem; max-width: 760px; font-size: 15px; }
.bar { width: 12rem; height: .9rem; vertical-align: -.1rem; }
.checks div:first-child { grid-column: auto; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; text-align: right; vertical-align: top; white-space: nowrap; border-bottom: 1px solid #dfe3e8; }
thead th { vertical-align: bottom; border-bottom: 2px solid #8a8f98; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
tbody th { font-weight: normal; white-space: normal; overflow-wrap: break-word; }
tbody th:has(code) { white-space: nowrap; position: static; }
.name { font-weight: 600; }
.about { display: block; width: 19rem; color: #5a626c; font-size: .8rem; }
.pools { margin-left: .5rem; padding: 0 .4rem; border: 1px dashed; color: #a04000; font-size: .75rem; white-space: nowrap; }
.reference th:first-child, .reference td { background: #e6f1f9; }
@media (max-width: 40rem) { .about { width: 9rem; } .pools { margin-left: 0; } main { padding: 1rem .75rem 3rem; } }
.signature { display: none; flex-wrap: wrap; gap: 12mm; }
.signature p { flex-basis: 100%; }
.signature span { flex: 1; border-top: 1px solid; padding-top: 1mm; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  html { font-size: 8.5pt; }
  nav { display: none; }
  .wide { overflow: visible; }
  img { max-width: 100%; max-height: 150mm; object-fit: contain; object-position: left; }
  #accuracy img { max-height: 115mm; }
  th:first-child { position: static; }
  tr, img, .group, .signature { break-inside: avoid; }
  .signature { display: flex; }
  details::details-content { content-visibility: visible; }
  h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
