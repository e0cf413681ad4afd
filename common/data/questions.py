"""Questions with several choices, from JSON lines or a hub, in the forms in which such sets are published.

A data set has the columns ``prompt`` (the question as text, with its choices if they are to be listed), ``choices`` (their
texts) and ``answer`` (index of the right one). Instructions with their output are questions with one choice.
"""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from metamoe.common.config import Data, ListChoices
from metamoe.common.data.hub import load_from_hub
from metamoe.common.errors import DataFormatError, InputFileError

FEATURES = Features({"prompt": Value("string"), "choices": List(Value("string")), "answer": Value("int64")})
_PARTS = ("train", "validation", "test")
_TRAIN_SHARE, _VALIDATION_SHARE = 0.8, 0.1
_DISTRACTORS = 3
_NEEDS_LIST = re.compile(r"\b(none|all|any|both|either|neither) of the above\b", re.IGNORECASE)
_FORMS = (
    "context, question, choices (a list), answer (an index); question, choices (text, label), answerKey; context, question, "
    "answer0 to answer3, label; context, question, answerA to answerC, label; instruction, input, output"
)


def load_questions(data: Data, name: str, split: str, hub: str) -> Dataset:
    """One part of a domain or of the public set.

    A set that has no part with labels to test on is divided: the first 80% of a shuffle with seed 0 train, the rest tests; the
    last tenth of what trains is for validation, where there is nothing else.

    Args:
        data: settings; ``data.folder`` says where to look.
        name: of the set, in ``data.folder``.
        split: "train", "validation" or "test".
        hub: its hub id, if there is no folder.

    Raises:
        InputFileError: there are no files, or they cannot be read.
        HubError: the hub does not give it.
        DataFormatError: it has other columns or labels.
    """
    return _parts(data.folder, name, hub, data.list_choices)[split]


def with_distractors(held_out: Dataset) -> Dataset:
    """Instructions as questions: each with the outputs of three others to choose among, which shows what a model forgot."""
    rng = np.random.default_rng(0)
    own = [choices[0] for choices in held_out["choices"]]
    rows: list[dict[str, Any] | None] = []
    for row, prompt in enumerate(held_out["prompt"]):
        others = [i for i in rng.permutation(len(own))[: _DISTRACTORS + 1].tolist() if i != row][:_DISTRACTORS]
        choices, answer = [own[i] for i in others], int(rng.integers(len(others) + 1))
        choices.insert(answer, own[row])
        rows.append({"prompt": prompt, "choices": choices, "answer": answer})
    return _dataset(rows)


def question_row(row: Mapping[str, Any], place: str, list_choices: ListChoices) -> dict[str, Any] | None:
    """A question out of a row in one of the forms in which they are published; None if it has no label.

    Args:
        row: of the published set.
        place: of the row, for errors.
        list_choices: when its prompt lists the choices, of which there are several: always, or where one of them speaks of the
            others.

    Raises:
        DataFormatError: names the place and what is wrong.
    """
    context = _text(row, "context", place) if "context" in row else ""
    if "instruction" in row and "output" in row:
        given = _text(row, "input", place) if "input" in row else ""
        asked = "\n".join(filter(None, (_text(row, "instruction", place), given)))
        return _question("", asked, [_text(row, "output", place)], 0, listed=False)
    choices: Any = row.get("choices")
    key: Any = row.get("answer")
    names: list[Any] = []
    if isinstance(choices, Mapping):
        choices, names, key = choices.get("text"), choices.get("label") or [], row.get("answerKey")
    elif choices is None and "label" in row:
        letters = "0123" if "answer0" in row else "ABC"
        choices, key = [_text(row, f"answer{letter}", place) for letter in letters], row["label"]
        names = list(range(len(choices))) if "answer0" in row else ["1", "2", "3"]
    if "question" not in row or not isinstance(choices, list) or key is None:
        raise DataFormatError(f"{place} has the columns {sorted(row)}; known forms are: {_FORMS}")
    if not choices or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataFormatError(f"{place}: choices = {choices!r} is not a list of texts")
    if key in ("", -1):
        return None
    names = names or list(range(len(choices)))
    if isinstance(key, bool) or key not in names or len(names) != len(choices):
        raise DataFormatError(f"{place}: the answer {key!r} is none of {names}")
    listed = len(choices) > 1 and (list_choices == "always" or any(map(_NEEDS_LIST.search, choices)))
    return _question(context, _text(row, "question", place), choices, names.index(key), listed)


def _question(context: str, question: str, choices: Sequence[str], answer: int, listed: bool) -> dict[str, Any]:
    lines = [
        *filter(None, (context.strip(), question.strip())),
        *(f"- {choice.strip()}" for choice in choices if listed),
        "Answer:",
    ]
    return {"prompt": "\n".join(lines), "choices": [choice.strip() for choice in choices], "answer": answer}


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataFormatError(f"{place}: {name} = {value!r} is not text; known forms are: {_FORMS}")
    return value


def read_questions(file: Path, list_choices: ListChoices) -> Dataset:
    """The labelled questions of a file of JSON lines, which may be compressed (.gz); ``list_choices`` as in
    :func:`question_row`.

    Raises:
        InputFileError: it cannot be read.
        DataFormatError: a line is not a question in a known form.
    """
    rows = []
    try:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    place = f"{file}, line {number}"
                    rows.append(question_row(_object(line, place), place, list_choices))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputFileError(f"{file} cannot be read: {error}") from error
    return _dataset(rows)


def _dataset(rows: Sequence[dict[str, Any] | None]) -> Dataset:
    """Rows as a data set, without those that have no label; there may be none."""
    labelled = [row for row in rows if row]
    return Dataset.from_dict({name: [row[name] for row in labelled] for name in FEATURES}, features=FEATURES)


def _object(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataFormatError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataFormatError(f"{place} is not a JSON object")
    return row


@lru_cache(maxsize=16)
def _parts(folder: str, name: str, hub: str, list_choices: ListChoices) -> dict[str, Dataset]:
    found = _from_folder(Path(folder) / name, list_choices) if folder else _from_hub(hub, list_choices)
    found = {part: data for part, data in found.items() if len(data)}
    if not found:
        raise InputFileError(f"{Path(folder) / name if folder else hub} has no question with a label")
    test = next((part for part in ("test", "validation") if part in found and len(found) > 1), None)
    if test is None:
        (whole,) = found.values()
        order = np.random.default_rng(0).permutation(len(whole))
        train, tested = np.split(order, [round(_TRAIN_SHARE * len(whole))])
        train_data, test_data, validation = whole.select(train), whole.select(tested), None
    else:
        train_data, test_data = found["train"], found[test]
        validation = found.get("validation") if test == "test" else None
    if validation is None:
        kept = len(train_data) - round(_VALIDATION_SHARE * len(train_data))
        validation, train_data = train_data.select(range(kept, len(train_data))), train_data.select(range(kept))
    return {"train": train_data, "validation": validation, "test": test_data}


def _from_folder(folder: Path, list_choices: ListChoices) -> dict[str, Dataset]:
    files = sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in folder.glob(pattern))
    named = {part: file for file in files for part in _PARTS if file.name.split(".")[0] == part}
    if "train" in named and len(named) == len(files):
        return {part: read_questions(file, list_choices) for part, file in named.items()}
    if len(files) != 1:
        raise InputFileError(
            f"{folder} has {len(files)} files of JSON lines; expected are train.jsonl with test.jsonl or validation.jsonl, or "
            "a single file of any name (each may end in .gz)"
        )
    return {"train": read_questions(files[0], list_choices)}


def _from_hub(hub: str, list_choices: ListChoices) -> dict[str, Dataset]:
    found = load_from_hub(hub)
    return {
        part: _dataset([question_row(row, f"{hub}, {part}, row {i}", list_choices) for i, row in enumerate(found[part])])
        for part in _PARTS
        if part in found
    }
