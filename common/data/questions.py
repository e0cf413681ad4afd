"""Text from files or a hub: questions with several choices, and what is no question.

A data set has the columns ``prompt`` (the question as text, with its choices if they are to be listed), ``choices`` (their
texts) and ``answer`` (index of the right one). What is no question has one choice, what comes after it, and the column
``turns``: what was said before it, from which a chat template makes the prompt, where the tokenizer has one.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from metamoe.common.config import Data
from metamoe.common.data.conversations import blocks_of, texts_of
from metamoe.common.data.hub import load_from_hub
from metamoe.common.data.layouts import INSTRUCTIONS, QUESTIONS, layout_of, mapped
from metamoe.common.data.partition import OWNERS
from metamoe.common.data.pictures import owner_of
from metamoe.common.data.rows import Question, counted_from, question_of
from metamoe.common.data.splits import by_part
from metamoe.common.data.survey import Survey
from metamoe.common.data.tables import KINDS, Row, read_rows, table_kind
from metamoe.common.errors import InputFileError

FEATURES = Features({"prompt": Value("string"), "choices": List(Value("string")), "answer": Value("int64")})
TEXT_FEATURES = Features({**FEATURES, "turns": List({"role": Value("string"), "content": Value("string")})})
_PLAIN = (".txt", ".md")
_DISTRACTORS = 3


@dataclass(frozen=True)
class Read:
    """What was read.

    Attributes:
        samples: of each row that has any; several of a conversation or a document.
        taken_for: names of layouts, and how many rows have each.
        left_out: where rows without a label or an answer are.
    """

    samples: list[list[Question]] = field(default_factory=list)
    taken_for: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)


def load_questions(data: Data, name: str, split: str, hub: str) -> Dataset:
    """One part of a domain or of the public set.

    A set that has no part with labels to test on is divided: a shuffle with seed 0 trains and, its last part, tests; the last
    part of what trains is for validation, where there is nothing else (``data.splits``).

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
    return _parts(data, name, hub)[split]


def with_distractors(held_out: Dataset) -> Dataset:
    """Answers without choices as questions: each with the answers of three others to choose among. Of a question that has
    choices it leaves those.
    """
    rng = np.random.default_rng(0)
    rows = list(held_out)
    own = [row["choices"][0] for row in rows]
    for number, row in enumerate(rows):
        if len(row["choices"]) > 1:
            continue
        others = [i for i in rng.permutation(len(own))[: _DISTRACTORS + 1].tolist() if i != number][:_DISTRACTORS]
        choices, answer = [own[i] for i in others], int(rng.integers(len(others) + 1))
        choices.insert(answer, own[number])
        rows[number] = row | {"choices": choices, "answer": answer}
    return _dataset(rows, held_out.features)


def read_questions(file: Path, data: Data) -> Dataset:
    """The labelled questions of a file, or its samples of text that is no question.

    Raises:
        InputFileError: it cannot be read.
        DataFormatError: a row is not in a known layout, nor in that of ``data.columns``.
    """
    return dataset_of(read_text(file, data), data)


def read_text(file: Path, data: Data) -> Read:
    """The same with what was left out, and what rows were taken for."""
    if data.source == "text" and file.suffix.lower() in _PLAIN:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputFileError(f"{file} cannot be read as UTF-8: {error}") from error
        blocks = blocks_of(text, data.block_words)
        return Read([blocks] if blocks else [], Counter(["documents"]), [] if blocks else [str(file)])
    return _read(read_rows(file), data, str(file))


def dataset_of(read: Read, data: Data) -> Dataset:
    """All samples that were read, in their order; there may be none."""
    features = TEXT_FEATURES if data.source == "text" else FEATURES
    if data.partition.column:
        features = Features({**features, OWNERS: Value("string")})
    return _dataset([sample for samples in read.samples for sample in samples], features)


def text_files(folder: Path, data: Data) -> dict[str, list[Path]]:
    """The files of a set by part; all of a set that was not divided are of "train".

    Raises:
        InputFileError: there are none, or which is for what is not clear.
        DataFormatError: there is no part of a name that the settings give.
    """
    files = sorted(file for file in folder.glob("*") if _is_text(file, data))
    named = by_part(files, data.splits, str(folder))
    chosen = any((data.splits.train, data.splits.validation, data.splits.test))
    if "train" in named and (chosen or sum(map(len, named.values())) == len(files)):
        return named
    if not files:
        folders = by_part([entry for entry in sorted(folder.glob("*")) if entry.is_dir()], data.splits, str(folder))
        within = {part: sorted(file for at in places for file in at.rglob("*")) for part, places in folders.items()}
        parts = {part: [file for file in there if _is_text(file, data)] for part, there in within.items()}
        if parts.get("train"):
            return parts
    if len(files) == 1 or (files and all(file.suffix.lower() in _PLAIN for file in files)):
        return {"train": files}
    raise InputFileError(
        f"{folder} has {len(files)} files of JSON lines, JSON, CSV or Parquet; expected are train.jsonl with test.jsonl or "
        "validation.jsonl, a single file of any name (each may end in .gz), or names given by data.splits"
    )


def text_survey(files: Mapping[str, list[Path]], data: Data) -> tuple[Survey, dict[str, list[Read]]]:
    """What rows of each part were taken for, and which were left out; and what was read.

    Raises:
        InputFileError, DataFormatError: as :func:`read_questions`.
    """
    reads = {part: [read_text(file, data) for file in there] for part, there in files.items()}
    counts = {part: dict(sum((read.taken_for for read in there), Counter[str]())) for part, there in reads.items()}
    left_out = [place for there in reads.values() for read in there for place in read.left_out]
    return Survey(counts, [], unusual={"left out, without a label or an answer": left_out} if left_out else {}), reads


def _is_text(file: Path, data: Data) -> bool:
    plain = data.source == "text" and file.suffix.lower() in _PLAIN and not file.name.startswith(".")
    return file.is_file() and (plain or table_kind(file) in KINDS)


def _read(rows: Iterable[tuple[str, Row]], data: Data, where: str) -> Read:
    own, known = mapped(data.columns), (*QUESTIONS, *INSTRUCTIONS)
    places: list[str] = []
    samples: list[list[Question]] = []
    taken_for = Counter[str]()
    unsure: list[tuple[int, Row]] = []
    owners: list[str | None] = []
    for place, row in rows:
        places.append(place)
        owners.append(owner_of(row, data.partition.column))
        if data.source == "text":
            name, found = texts_of(row, place, data)
        else:
            layout = layout_of(row, place, known, own)
            name, found = layout.name, []
            if layout.answer_is == "counted":
                unsure.append((len(samples), row))
            elif question := question_of(row, layout, place, data.list_choices):
                found = [question]
        taken_for[name] += 1
        samples.append(found)
    if unsure:
        layout = counted_from([row for _, row in unsure], layout_of(unsure[0][1], where, known, own), where)
        for number, row in unsure:
            if question := question_of(row, layout, places[number], data.list_choices):
                samples[number] = [question]
    if data.partition.column:
        samples = [[sample | {OWNERS: owner} for sample in found] for found, owner in zip(samples, owners, strict=True)]
    left_out = [place for place, found in zip(places, samples, strict=True) if not found]
    return Read([found for found in samples if found], taken_for, left_out)


def _dataset(samples: Sequence[Question], features: Features) -> Dataset:
    return Dataset.from_dict({name: [sample.get(name) for sample in samples] for name in features}, features=features)


@lru_cache(maxsize=16)
def _parts(data: Data, name: str, hub: str) -> dict[str, Dataset]:
    where = str(Path(data.folder) / name) if data.folder else hub
    read = _from_folder(Path(where), data) if data.folder else _from_hub(hub, data)
    found = {part: samples for part, samples in read.items() if samples}
    if not found:
        raise InputFileError(f"{where} has no question with a label, and no answer")
    test = next((part for part in ("test", "validation") if part in found and len(found) > 1), None)
    if test is None:
        (whole,) = found.values()
        order = np.random.default_rng(0).permutation(len(whole))
        train, tested = np.split(order, [round((1 - data.splits.test_fraction) * len(whole))])
        parts = {"train": [whole[i] for i in train], "test": [whole[i] for i in tested]}
    elif "train" not in found:
        raise InputFileError(f"{where} has only {' and '.join(found)}; a part to train on is needed: set data.splits.train")
    else:
        parts = {"train": found["train"], "test": found[test]}
        if test == "test" and "validation" in found:
            parts["validation"] = found["validation"]
    if "validation" not in parts:
        kept = len(parts["train"]) - round(data.splits.validation_fraction * len(parts["train"]))
        parts |= {"validation": parts["train"][kept:], "train": parts["train"][:kept]}
    return {part: dataset_of(Read(samples), data) for part, samples in parts.items()}


def _from_folder(folder: Path, data: Data) -> dict[str, list[list[Question]]]:
    read = {part: [read_text(file, data) for file in files] for part, files in text_files(folder, data).items()}
    return _samples(read, str(folder))


def _from_hub(hub: str, data: Data) -> dict[str, list[list[Question]]]:
    found = load_from_hub(hub)

    def read(name: str) -> Read:
        rows: Iterable[tuple[str, Any]] = ((f"{hub}, {name}, row {i}", row) for i, row in enumerate(found[name]))
        return _read(rows, data, f"{hub}, {name}")

    parts = by_part(found, data.splits, hub)
    return _samples({part: [read(name) for name in names] for part, names in parts.items()}, hub)


def _samples(read: Mapping[str, list[Read]], where: str) -> dict[str, list[list[Question]]]:
    """What was read by part; what was left out is said."""
    if left_out := [place for there in read.values() for found in there for place in found.left_out]:
        logging.getLogger("metamoe").info(
            "%s: %d rows are left out, without a label or an answer, the first of them %s", where, len(left_out), left_out[0]
        )
    return {part: [samples for found in there for samples in found.samples] for part, there in read.items()}
