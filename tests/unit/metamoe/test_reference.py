"""The reference of settings: complete, true, and the one in the docs."""

import json
from pathlib import Path

import pytest

from metamoe.common.config import Settings
from metamoe.common.errors import UnknownSettingError
from metamoe.common.presets import changed, to_toml
from metamoe.reference import all_settings, as_markdown


def test_every_setting_is_there_with_its_default_and_what_it_is_for() -> None:
    found = all_settings()
    # Each default, set as one sets it on the command line, changes nothing; none is left out.
    assert changed(Settings(), [f"{setting.name}={setting.default}" for setting in found]) == Settings()
    leaves = [line for line in to_toml(Settings()).splitlines() if " = " in line]
    assert len(found) == len(leaves)
    assert [setting.name for setting in found if not setting.about] == []


def test_kinds_and_bounds() -> None:
    by_name = {setting.name: setting for setting in all_settings()}
    assert by_name["router.context"].kind == "number >= 0 <= 1"
    assert by_name["clients"].kind == "integer >= 1"
    assert by_name["proxies.selection"].kind == "dpp | relevance | random"
    assert by_name["data.domains"].kind == "list of text"
    assert (by_name["seed"].group, by_name["lora.rank"].group) == ("run", "lora")


def test_a_group_that_is_not_there_is_named() -> None:
    with pytest.raises(
        UnknownSettingError, match=r"'routers'; there are run, data, data.partition, data.splits, data.columns, proxies"
    ):
        all_settings("routers")


def test_the_page_in_the_docs_is_this_one() -> None:
    page = Path(__file__).parents[3] / "docs" / "settings.md"
    assert page.read_text() == as_markdown(), "metamoe settings --markdown > docs/settings.md"


def test_the_command(run_metamoe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_metamoe("settings", "lora", "--json") == 0
    assert [setting["name"] for setting in json.loads(capsys.readouterr().out)["settings"]] == [
        "lora.rank",
        "lora.alpha",
        "lora.first-layer",
    ]
    monkeypatch.setenv("COLUMNS", "80")
    assert run_metamoe("settings", "router") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "router.top-k = 2" in shown
