"""``make bench``: ratios taken side by side in one run, as a table and in bench.json."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.audit import audit_cost
from benchmarks.selection import imagenet_cost, selection_cost
from common.files import write_json

console = Console()
with console.status("selection, 3,000 and 20,000 items"):
    results = selection_cost(3_000, 5) | selection_cost(20_000, 2)
with console.status("selection, as many items as ImageNet has"):
    results |= imagenet_cost()
with console.status("a run of preset glyphs, a few minutes"):
    results |= audit_cost()
write_json(Path("bench.json"), results)
table = Table("what", "ours", "against", "ratio", "unit")
for name, row in results.items():
    table.add_row(name, f"{row['ours']:,.3f}", f"{row['peer']:,.3f}", f"{row['ratio']:.4f}", str(row["unit"]))
console.print(table)
