"""From a row to a question: its prompt, its choices, and which is right."""

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from metamoe.common.config import ListChoices
from metamoe.common.data.layouts import Layout, shown, value_of
from metamoe.common.errors import DataFormatError

Question = dict[str, Any]
"""``prompt``, ``choices`` and ``answer``, the index of the right one."""

_NEEDS_LIST = re.compile(r"\b(none|all|any|both|either|neither) of the above\b", re.IGNORECASE)
_UNLABELLED = (None, "", -1, "-1")
_DIGITS = 9
_TRUTH = {"true": 1, "yes": 1, "1": 1, "false": 0, "no": 0, "0": 0}


def question_of(row: Mapping[str, Any], layout: Layout, place: str, list_choices: ListChoices) -> Question | None:
    """A question out of a row; None if it has no label, or no answer.

    Args:
        row: of the published set.
        layout: which of its columns is what; all that it needs are there.
        place: of the row, for errors.
        list_choices: when its prompt lists the choices, of which there are several: always, or where one of them speaks of the
            others.

    Raises:
        DataFormatError: names the place, what is wrong, and the row.
    """
    key = value_of(row, layout.answer)
    asked = _text(row, layout.question, place)
    context = _text(row, layout.context, place) if value_of(row, layout.context) is not None else ""
    if not (layout.choices or layout.fixed or layout.wrong):
        after = _text(row, layout.after, place) if value_of(row, layout.after) is not None else ""
        answered = _text(row, layout.answer, place) if key is not None else ""
        asked = "\n".join(filter(None, (asked, after)))
        return _prompted(context, asked, [answered], 0, listed=False) if answered.strip() else None
    if _unlabelled(key):
        return None
    if layout.wrong:
        right = _text(row, layout.answer, place)
        wrong = [text for path in layout.wrong for text in _texts(value_of(row, path), row, path, place)[0]]
        choices, answer = [right, *wrong], 0
    else:
        choices, labels = list(layout.fixed), list[str]()
        for path in layout.choices:
            texts, names = _texts(value_of(row, path), row, path, place)
            choices += texts
            labels += names
        if layout.labels:
            labels = _names(value_of(row, layout.labels), row, layout.labels, place)
        if labels and (len(labels) != len(choices) or len(set(labels)) < len(labels)):
            raise _wrong(row, place, f"{len(choices)} choices have the labels {labels}")
        answer = _index(key, choices, labels, layout, row, place)
    if not all(choice.strip() for choice in choices):
        raise _wrong(row, place, f"choices = {choices!r} is not a list of texts")
    if layout.moved or layout.wrong:
        # Else the right one would be the first, or the last, wherever a prompt lists them.
        shift = zlib.crc32(asked.encode("utf-8", "surrogatepass")) % len(choices)
        choices, answer = choices[-shift:] + choices[:-shift], (answer + shift) % len(choices)
    listed = len(choices) > 1 and (list_choices == "always" or any(map(_NEEDS_LIST.search, choices)))
    return _prompted(context, asked, choices, answer, listed)


def counted_from(rows: Sequence[Mapping[str, Any]], layout: Layout, place: str) -> Layout:
    """The layout with numbers of answers counted from zero or from one, of a set that is published in both ways.

    Raises:
        DataFormatError: the rows do not say.
    """
    found = [_plain(value_of(row, layout.answer)) or "" for row in rows]
    numbers = {int(text) for text in found if text.isdecimal() and len(text) < _DIGITS}
    last = len(layout.choices)
    if (0 in numbers) == (last in numbers):
        raise DataFormatError(
            f"{place}: {layout.answer!r} has the numbers {sorted(numbers)}, which may be counted from 0 or from 1; say it by "
            "data.columns.answer-is = index or one-based, with the other data.columns"
        )
    return replace(layout, answer_is="index" if 0 in numbers else "one-based")


def _index(key: Any, choices: Sequence[str], labels: Sequence[str], layout: Layout, row: Any, place: str) -> int:
    """Which choice a row says is right."""
    if isinstance(key, list):
        key = key.index(1) if key.count(1) == 1 and len(key) == len(choices) else key[0] if len(key) == 1 else key
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    how = layout.answer_is
    found = set()
    if labels and how is None:
        found = {number for number, label in enumerate(labels) if label == _plain(key)}
    else:
        found = _meant(key, choices, how)
    if len(found) == 1 and 0 <= (answer := found.pop()) < len(choices):
        return answer
    allowed = labels or {"one-based": list(range(1, len(choices) + 1)), "boolean": [False, True]}.get(how or "")
    if len(found) > 1:
        raise _wrong(row, place, f"{layout.answer} = {key!r} may be choice {sorted(found)}; say it by data.columns.answer-is")
    raise _wrong(row, place, f"the answer {key!r} in {layout.answer!r} is none of {allowed or list(range(len(choices)))}")


def _meant(key: Any, choices: Sequence[str], how: str | None) -> set[int]:
    """The choices that an answer may mean: by number, letter, or text."""
    text = _plain(key)
    if text is None:
        return {_TRUTH[str(key).lower()]} if how == "boolean" and isinstance(key, bool) else set()
    number = int(text) if text.isdecimal() and len(text) < _DIGITS else None
    letter = ord(text) - ord("A") if len(text) == 1 and "A" <= text <= "Z" else None
    by: dict[str, set[int | None]] = {
        "index": {number},
        "one-based": {None if number is None else number - 1},
        "letter": {letter},
        "text": {n for n, choice in enumerate(choices) if isinstance(key, str) and choice.strip() == text},
        "boolean": {_TRUTH.get(text.lower())},
    }
    ways = [how] if how else ["index"] if not isinstance(key, str) else ["index", "letter", "text"]
    return {n for way in ways for n in by[way] if n is not None and 0 <= n < len(choices)}


def _plain(key: Any) -> str | None:
    """An answer or a label as text; None if it is neither text nor a number."""
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        return None
    return str(key).strip()


def _unlabelled(key: Any) -> bool:
    return (isinstance(key, float) and math.isnan(key)) or (not isinstance(key, bool) and key in _UNLABELLED)


def _texts(value: Any, row: Any, path: str, place: str) -> tuple[list[str], list[str]]:
    """Choices in a column, and their labels if they are there too."""
    value = _unpacked(value)
    if isinstance(value, Mapping):
        there = {str(name): text for name, text in value.items() if text is not None}
        return _checked(list(there.values()), row, path, place), list(there)
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        texts, names = [entry.get("text") for entry in value], [_plain(entry.get("label")) for entry in value]
        return _checked(texts, row, path, place), [name for name in names if name is not None]
    return _checked(value if isinstance(value, list) else [value], row, path, place), []


def _checked(texts: list[Any], row: Any, path: str, place: str) -> list[str]:
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise _wrong(row, place, f"{path} = {texts!r} is not a list of texts")
    return texts


def _names(value: Any, row: Any, path: str, place: str) -> list[str]:
    value = _unpacked(value)
    names = [_plain(name) for name in value] if isinstance(value, list) else [None]
    found = [name for name in names if name is not None]
    if len(found) < len(names):
        raise _wrong(row, place, f"{path} = {value!r} is not a list of labels")
    return found


def _unpacked(value: Any) -> Any:
    """A list in a cell of a CSV file, which is text there."""
    if isinstance(value, str) and value.startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(row: Mapping[str, Any], path: str, place: str) -> str:
    value = value_of(row, path)
    if not isinstance(value, str):
        raise _wrong(row, place, f"{path} = {value!r} is not text")
    return value


def _wrong(row: Any, place: str, what: str) -> DataFormatError:
    return DataFormatError(f"{place}: {what}. The row: {shown(row)}")


def _prompted(context: str, question: str, choices: Sequence[str], answer: int, listed: bool) -> Question:
    lines = [
        *filter(None, (context.strip(), question.strip())),
        *(f"- {choice.strip()}" for choice in choices if listed),
        "Answer:",
    ]
    return {"prompt": "\n".join(lines), "choices": [choice.strip() for choice in choices], "answer": answer}
