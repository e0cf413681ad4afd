"""Every setting: name, what it may be, default, what for; read from the settings themselves."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import tomli_w
from pydantic.fields import FieldInfo

from metamoe.common.config import Section, Settings
from metamoe.common.errors import UnknownSettingError

_RUN = "run"
_KINDS = {bool: "true | false", int: "integer", float: "number", str: "text"}


@dataclass(frozen=True)
class Setting:
    """A setting: its group ("run" where it is in none), dotted name, what it may be, default as in TOML, and what it is for."""

    group: str
    name: str
    kind: str
    default: str
    about: str


def all_settings(group: str | None = None) -> list[Setting]:
    """Every setting, or those of a group, in the order of a run's settings.toml.

    Raises:
        UnknownSettingError: there is no such group.
    """
    found = list(_settings_of(Settings, ""))
    groups = list(dict.fromkeys(setting.group for setting in found))
    if group is not None and group not in groups:
        raise UnknownSettingError(f"no group of settings is called {group!r}; there are {', '.join(groups)}")
    return [setting for setting in found if group in (None, setting.group)]


def as_markdown() -> str:
    """The reference as a page, docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Made by `metamoe settings --markdown` from `common/config/`. `--set NAME=VALUE` changes one.",
        "",
    ]
    for group in dict.fromkeys(setting.group for setting in all_settings()):
        lines += [
            f"## {group}",
            "",
            _about(group),
            "",
            "| setting | may be | default | what for |",
            "| --- | --- | --- | --- |",
        ]
        for setting in all_settings(group):
            cells = (f"`{setting.name}`", setting.kind, f"`{setting.default}`", setting.about)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _about(group: str) -> str:
    section: Any = Settings
    for name in group.split(".") if group != _RUN else ():
        section = next(field.annotation for field in section.model_fields.values() if field.alias == name)
    return " ".join((section.__doc__ or "").split())


def _settings_of(section: type[Section], prefix: str) -> Iterator[Setting]:
    # The run's own first, as in TOML: what follows a group belongs to it.
    fields = sorted(section.model_fields.items(), key=lambda item: _is_section(item[1]))
    for name, field in fields:
        alias = field.alias or name
        if _is_section(field):
            yield from _settings_of(field.annotation, f"{prefix}{alias}.")  # type: ignore[arg-type]
        else:
            default = tomli_w.dumps({"x": _plain(field.default)}).removeprefix("x = ").strip()
            yield Setting(
                prefix.rstrip(".") or _RUN, prefix + alias, _kind(field), " ".join(default.split()), field.description or ""
            )


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _kind(field: FieldInfo) -> str:
    """What a value may be, in words, with its bounds."""
    words = _type_words(field.annotation)
    for bound in field.metadata:
        match bound:
            case annotated_types.Ge(ge=least):
                words += f" >= {least}"
            case annotated_types.Gt(gt=least):
                words += f" > {least}"
            case annotated_types.Le(le=most):
                words += f" <= {most}"
            case annotated_types.Lt(lt=most):
                words += f" < {most}"
    return words


def _type_words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_words, get_args(annotation)))
    if origin is tuple:
        return f"list of {_type_words(get_args(annotation)[0])}"
    if hasattr(annotation, "__metadata__"):
        return _type_words(get_args(annotation)[0])
    return _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
