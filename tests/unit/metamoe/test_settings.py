"""Every setting in words: what ``metamoe settings`` and docs/settings.md say of it."""

import io
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from metamoe.common.config import Settings
from metamoe.common.errors import UnknownSettingError
from metamoe.common.presets import load_settings, to_toml
from metamoe.described import Setting, described, groups, in_groups, markdown, value_text


def by_name() -> dict[str, Setting]:
    return {setting.name: setting for setting in described()}


def test_every_setting_is_there_with_its_default_and_what_it_is_for() -> None:
    # What a run's settings.toml holds is what there is.
    written = tomllib.loads(to_toml(Settings()))
    expected = {
        f"{group}.{name}": value for group, part in written.items() if isinstance(part, dict) for name, value in part.items()
    }
    expected |= {name: value for name, value in written.items() if not isinstance(value, dict)}
    assert {setting.name: setting.default for setting in described()} == expected
    assert all(setting.about and setting.allowed + setting.type for setting in described())
    assert all(groups().values())
    assert [setting for _, _, some in in_groups(described()) for setting in some] == described()


def test_defaults_are_shown_as_set_takes_them() -> None:
    changes = [f"{setting.name}={value_text(setting.default)}" for setting in described()]
    # Preset glyphs sets some; with every default it is as if it set none.
    assert load_settings("glyphs", changes) == Settings()


@pytest.mark.parametrize(
    ("name", "type_", "allowed"),
    [
        ("router.rows", "text", "fisher, dot or fresh"),
        ("router.top-k", "whole number", "a whole number, 1 or more"),
        ("router.context", "number", "0 to 1"),
        ("router.temperature", "number", "more than 0"),
        ("router.seed-log-odds", "number", ""),
        ("privacy.delta", "number", "more than 0 and less than 1"),
        ("router.seed-expert", "true or false", "true or false"),
        ("data.test-corruptions", "list of texts", "a list of blur, noise, inversion"),
        ("data.domains", "list of texts", "a list of texts, not empty"),
        ("seed", "whole number", "a whole number, 0 to 2147483647"),
        ("compute.client-device", "text", r"of the form ^(auto|cpu|cuda(:\d+)?)$"),
    ],
)
def test_types_and_ranges_in_words(name: str, type_: str, allowed: str) -> None:
    setting = by_name()[name]
    assert (setting.type, setting.allowed) == (type_, allowed)
    assert setting.choices == (("fisher", "dot", "fresh") if name == "router.rows" else setting.choices)


def test_a_group_or_one_setting_is_chosen_and_others_are_refused() -> None:
    assert {setting.group for setting in described("router")} == {"router"}
    assert [setting.name for setting in described("router.top-k")] == ["router.top-k"]
    assert [setting.name for setting in described("seed")] == ["seed"]
    for wrong in ("nope", ""):
        with pytest.raises(UnknownSettingError, match=r"the groups are data, proxies.*in none are preset, seed"):
            described(wrong)


def test_the_page_in_the_docs_is_what_is_generated() -> None:
    page = Path(__file__).parents[3] / "docs" / "settings.md"
    assert page.read_text() == markdown(), "docs/settings.md is not up to date; 'make settings' writes it"


def test_the_command_shows_settings_within_80_columns(run_metamoe, monkeypatch, capsys) -> None:
    from metamoe import cli_settings

    file = io.StringIO()
    monkeypatch.setattr(cli_settings, "console", Console(file=file, width=80, force_terminal=True, color_system=None))
    assert run_metamoe("settings") == 0
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for setting in described():
        assert f"{setting.name} = {value_text(setting.default)} {setting.allowed or setting.type} {setting.about}" in words
    monkeypatch.undo()
    assert run_metamoe("settings", "nope") == UnknownSettingError.exit_code
    assert "compute" in capsys.readouterr().err
