"""Every setting in words, from what ``common/config.py`` declares."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metamoe.common.config import Settings
from metamoe.common.errors import UnknownSettingError

_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_NOT_A_GROUP = ""
_ABOUT_THE_PAGE = (
    "Written by `make settings` out of `common/config.py`; `metamoe settings [GROUP]` shows the same. `--set NAME=VALUE`",
    "changes one. A default applies where a preset says nothing: `metamoe presets NAME` shows a preset, and the",
    "`settings.toml` in a run's folder all that the run had.",
)


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: as after ``--set`` and in a preset, e.g. ``router.top-k``.
        group: the part of it before the dot; empty if there is none.
        type: of its value.
        default: what it is unless a preset or ``--set`` says otherwise.
        choices: all possible values, or all possible members of a list; empty if they cannot be listed.
        allowed: the choices or the range in words; empty if any value of the type is allowed.
        about: what it is for.
    """

    name: str
    group: str
    type: str
    default: Any
    choices: tuple[str, ...]
    allowed: str
    about: str


def groups() -> dict[str, str]:
    """Names of the groups of settings, and what each is about; the empty name is that of the settings in no group."""
    schema = Settings.model_json_schema()
    sections = {name: _section(schema, part) for name, part in schema["properties"].items() if "$ref" in part}
    about = {_NOT_A_GROUP: schema["description"]} | {name: section["description"] for name, section in sections.items()}
    return {name: " ".join(text.split()) for name, text in about.items()}


def described(wanted: str | None = None) -> list[Setting]:
    """All settings in the order of ``common/config.py``, those of no group first; or those of a group, or one by its name.

    Raises:
        UnknownSettingError: there is no such group and no such setting.
    """
    schema = Settings.model_json_schema()
    properties = schema["properties"]
    whole = [_setting("", name, part) for name, part in properties.items() if "$ref" not in part]
    for group, part in properties.items():
        if "$ref" in part:
            whole += [_setting(group, name, field) for name, field in _section(schema, part)["properties"].items()]
    chosen = [s for s in whole if wanted in (None, s.name) or (s.group == wanted != _NOT_A_GROUP)]
    if not chosen:
        known = [name for name in groups() if name != _NOT_A_GROUP]
        alone = [s.name for s in whole if s.group == _NOT_A_GROUP]
        raise UnknownSettingError(
            f"unknown group of settings {wanted!r}; the groups are {', '.join(known)}; in none are {', '.join(alone)}"
        )
    return chosen


def in_groups(settings: Sequence[Setting]) -> Iterator[tuple[str, str, list[Setting]]]:
    """Settings by group: its name, what it is about, and those of them that are in it."""
    for group, about in groups().items():
        if own := [setting for setting in settings if setting.group == group]:
            yield group, about, own


def value_text(value: Any) -> str:
    """A value as after ``--set`` and in TOML: ``2``, ``true``, ``"fisher"``, ``["digits", "greek"]``."""
    return json.dumps(value, ensure_ascii=False)


def markdown() -> str:
    """All settings as a page of the docs."""
    lines = ["# Settings", "", *_ABOUT_THE_PAGE]
    for group, about, settings in in_groups(described()):
        lines += ["", f"## {group or 'In no group'}", "", about, ""]
        lines += ["| setting | default | allowed | what for |", "|---|---|---|---|"]
        for setting in settings:
            cells = (f"`{setting.name}`", f"`{value_text(setting.default)}`", setting.allowed or setting.type, setting.about)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _section(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    section: Mapping[str, Any] = schema["$defs"][part["$ref"].rpartition("/")[2]]
    return section


def _setting(group: str, name: str, field: Mapping[str, Any]) -> Setting:
    of = field.get("items", field)
    type_ = f"list of {_TYPES[of['type']]}s" if of is not field else _TYPES[of["type"]]
    choices = tuple(of.get("enum", ()))
    return Setting(
        name=f"{group}.{name}" if group else name,
        group=group,
        type=type_,
        default=field["default"],
        choices=choices,
        allowed=_allowed(field, choices),
        about=field["description"],
    )


def _allowed(field: Mapping[str, Any], choices: Sequence[str]) -> str:
    if field["type"] == "array":
        return f"a list of {', '.join(choices) or 'texts'}{', not empty' if field.get('minItems') else ''}"
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
    if field["type"] == "boolean":
        return "true or false"
    low, above, high, below = (field.get(f"{name}imum") for name in ("min", "exclusiveMin", "max", "exclusiveMax"))
    whole = "a whole number, " if field["type"] == "integer" else ""
    if low is not None and high is not None:
        return f"{whole}{low} to {high}"
    limits = [f"{low} or more" if low is not None else "", f"more than {above}" if above is not None else ""]
    limits += [f"{high} or less" if high is not None else "", f"less than {below}" if below is not None else ""]
    words = " and ".join(limit for limit in limits if limit)
    return whole + words if words else f"of the form {field['pattern']}" if "pattern" in field else ""
