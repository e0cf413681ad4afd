"""What a preset needs and lacks here, said before a run."""

import json
from pathlib import Path

from metamoe.check import Finding, check_preset
from metamoe.common.config import Settings
from metamoe.common.presets import changed
from tests.conftest import small_run


def test_a_pool_that_the_public_set_cannot_fill_is_missing_something(seed_folder: Path) -> None:
    small = small_run(seed_folder)
    assert [finding for finding in check_preset(small) if not finding.fine and finding.what == "public set"] == []
    settings = changed(small, ["proxies.pool=300"])
    found = [finding for finding in check_preset(settings) if finding.what == "public set"]
    said = "proxies.pool = 300 is not less than the 300 samples of the public set; lower it"
    assert found == [Finding("public set", "300 samples", True), Finding("public set", said, False)]
    # Random proxies need no pool.
    random = changed(settings, ["proxies.selection=random"])
    assert [finding.fine for finding in check_preset(random) if finding.what == "public set"] == [True]


def test_rows_that_are_left_out_are_listed(small: Settings, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "output": "" if i == 4 else f"it is {i}"} for i in range(30)]
    for name in ("public", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": "text", "folder": str(tmp_path), "domains": ("notes",)}
    settings = small.model_copy(update={"data": small.data.model_copy(update=data)})
    named = f"1 left out, without a label or an answer: {tmp_path / 'notes' / 'all.jsonl'}, line 5"
    assert Finding("notes", named, True) in list(check_preset(settings))
