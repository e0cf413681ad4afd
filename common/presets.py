"""Settings from presets, files and overrides, each error with what was given and what is allowed."""

import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from metamoe.common.config import Section, Settings
from metamoe.common.errors import InvalidSettingError, PresetNotFoundError, UnknownSettingError


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("metamoe.common") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def preset_text(preset: str) -> str:
    """The TOML text of a preset, given by name or by the path of a file.

    Raises:
        PresetNotFoundError: there is neither.
    """
    if preset in preset_names():
        return (resources.files("metamoe.common") / "presets" / f"{preset}.toml").read_text()
    if Path(preset).is_file():
        try:
            return Path(preset).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidSettingError(f"preset {preset!r} cannot be read: {error}") from error
    raise PresetNotFoundError(f"preset {preset!r}: no such file, and the built-in presets are {', '.join(preset_names())}")


def load_settings(preset: str, overrides: Iterable[str] = (), values: Mapping[str, object] | None = None) -> Settings:
    """Settings from a preset (name or TOML file), overrides such as ``"router.top-k=2"``, and after them values.

    Args:
        preset: name or file.
        overrides: as a command line has them.
        values: as Python has them, see :func:`by_name`.

    Raises:
        PresetNotFoundError, UnknownSettingError, InvalidSettingError, ProxyCountError: with what was given and what is
            allowed.
    """
    try:
        found = tomllib.loads(preset_text(preset))
    except tomllib.TOMLDecodeError as error:
        raise InvalidSettingError(f"preset {preset!r} is not valid TOML: {error}") from error
    return _overridden(found, [*map(_parsed, overrides), *by_name(values or {}).items()])


def changed(settings: Settings, overrides: Iterable[str]) -> Settings:
    """Settings with overrides as :func:`load_settings` takes them, and its errors."""
    return _overridden(settings.model_dump(mode="json", by_alias=True), map(_parsed, overrides))


def by_name(values: Mapping[str, object]) -> dict[str, object]:
    """Settings given in Python, each under its whole name: ``{"router.top-k": 2}``, which can also be given as
    ``{"router": {"top_k": 2}}``. A path is its text.
    """
    return dict(_leaves("", values))


def with_absolute_paths(settings: Settings) -> Settings:
    """The same settings, with all paths as seen from anywhere: a run's processes work in other folders."""
    if Path(settings.seed_model).exists() and settings.seed_model != "glyphs":
        settings = settings.model_copy(update={"seed_model": str(Path(settings.seed_model).absolute())})
    if settings.data.folder:
        folder = str(Path(settings.data.folder).absolute())
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"folder": folder})})
    return settings


def _leaves(group: str, values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        name = group + str(key).replace("_", "-")
        if isinstance(value, Mapping):
            yield from _leaves(f"{name}.", value)
        else:
            yield name, os.fspath(value) if isinstance(value, os.PathLike) else value


def _parsed(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InvalidSettingError(f"setting {override!r} is not of the form key=value, for example router.top-k=2")
    return key.strip(), _scalar(text.strip())


def _overridden(values: dict[str, Any], overrides: Iterable[tuple[str, Any]]) -> Settings:
    for name, value in overrides:
        _put(values, name, value)
    return validated(values)


def validated(values: dict[str, Any]) -> Settings:
    """Settings from plain values; the errors are those of :func:`load_settings`."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UnknownSettingError(f"unknown setting {name!r}{_known(first['loc'])}") from error
        reason = first["msg"].removeprefix("Value error, ")
        # Our own checks across fields name the settings themselves.
        given = "" if first["type"] == "value_error" else f"{name or 'settings'} = {first['input']!r}: "
        raise InvalidSettingError(f"{given}{reason}") from error


def to_toml(settings: Settings) -> str:
    """All settings as TOML; :func:`load_settings` reads it back to an equal value."""
    return tomli_w.dumps(settings.model_dump(mode="json", by_alias=True))


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for part in groups:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UnknownSettingError(f"unknown setting {name!r}: {part!r} is not a group of settings")
    values[last] = value


def _scalar(text: str) -> Any:
    """A TOML value, or the text itself: ``2``, ``0.5``, ``true``, ``["a", "b"]``, ``fisher``."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _known(location: tuple[int | str, ...]) -> str:
    section: Any = Settings
    for part in location[:-1]:
        field = next((f for n, f in section.model_fields.items() if part in (n, f.alias)), None)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):
            return ""
        section = field.annotation
    return "; known here: " + ", ".join(sorted(field.alias or name for name, field in section.model_fields.items()))
