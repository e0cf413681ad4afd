"""Rows as well-known sets are published (columns from their cards), files as other programs write them, and what is wrong."""

import contextlib
import csv
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyarrow import parquet

from metamoe.common.config import Columns, Data
from metamoe.common.data.conversations import TEXTS
from metamoe.common.data.layouts import QUESTIONS
from metamoe.common.data.questions import load_questions, read_questions, read_text
from metamoe.common.data.tables import read_rows
from metamoe.common.errors import DataFormatError, InputFileError, InvalidSettingError
from metamoe.common.presets import validated

DATA = Data(source="questions", folder="unused")
PUBLISHED = {
    "ARC, CommonsenseQA": (
        {"id": "1", "question": "Wet?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, "answerKey": "B"},
        ["fire", "water"],
        "water",
    ),
    "ARC, CommonsenseQA, OpenBookQA, as files": (
        {
            "id": "1",
            "question": {"stem": "Wet?", "choices": [{"text": "fire", "label": "1"}, {"text": "water", "label": "2"}]},
            "answerKey": "2",
        },
        ["fire", "water"],
        "water",
    ),
    "OpenBookQA": (
        {"id": "7", "question_stem": "The sun feeds", "choices": {"text": ["puppies", "plants"], "label": ["A", "B"]}}
        | {"answerKey": "B"},
        ["puppies", "plants"],
        "plants",
    ),
    "CosmosQA": (
        {"context": "It rained.", "question": "Why?", "label": 2} | {f"answer{i}": f"for {i}" for i in range(4)},
        [f"for {i}" for i in range(4)],
        "for 2",
    ),
    "SocialIQA": (
        {"context": "It rained.", "question": "Why?", "label": "3"} | {f"answer{c}": f"for {c}" for c in "ABC"},
        ["for A", "for B", "for C"],
        "for C",
    ),
    "HellaSwag": (
        {"ind": 1, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "ctx": "A man sits. He"}
        | {"endings": ["starts.", "eats.", "flies.", "goes."], "label": "0", "split": "train"},
        ["starts.", "eats.", "flies.", "goes."],
        "starts.",
    ),
    "PIQA": ({"goal": "Open a jar", "sol1": "hit it", "sol2": "twist it", "label": 1}, ["hit it", "twist it"], "twist it"),
    "WinoGrande": (
        {"sentence": "Sam beat Tim so _ won.", "option1": "Sam", "option2": "Tim", "answer": "1"},
        ["Sam", "Tim"],
        "Sam",
    ),
    "BoolQ": ({"question": "is it blue", "passage": "It is blue.", "answer": True}, ["no", "yes"], "yes"),
    "BoolQ of SuperGLUE": ({"question": "is it red", "passage": "It is blue.", "idx": 3, "label": 0}, ["no", "yes"], "no"),
    "MMLU": ({"question": "2+2?", "subject": "sums", "choices": ["3", "4", "5", "6"], "answer": 1}, ["3", "4", "5", "6"], "4"),
    "MMLU-Pro": (
        {
            "question_id": 70,
            "question": "2+2?",
            "options": ["3", "4", "5"],
            "answer": "B",
            "answer_index": 1,
            "category": "sums",
        },
        ["3", "4", "5"],
        "4",
    ),
    "SciQ": (
        {"question": "What?", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d", "support": ""},
        ["a", "b", "c", "d"],
        "d",
    ),
    "RACE": (
        {"example_id": "1", "article": "It rained.", "question": "So?", "options": ["dry", "wet", "hot", "old"], "answer": "B"},
        ["dry", "wet", "hot", "old"],
        "wet",
    ),
    "MedQA": (
        {
            "question": "Which?",
            "answer": "rest",
            "options": {"A": "salt", "B": "rest"},
            "meta_info": "step1",
            "answer_idx": "B",
        },
        ["salt", "rest"],
        "rest",
    ),
    "TruthfulQA": (
        {"question": "Is it?", "mc1_targets": {"choices": ["yes", "no", "perhaps"], "labels": [1, 0, 0]}}
        | {"mc2_targets": {"choices": ["yes", "no"], "labels": [1, 0]}},
        ["yes", "no", "perhaps"],
        "yes",
    ),
    "TruthfulQA, generation": (
        {"question": "Is it?", "best_answer": "yes", "correct_answers": ["yes"], "incorrect_answers": ["no", "perhaps"]},
        ["yes", "no", "perhaps"],
        "yes",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_recognised(tmp_path: Path, name: str) -> None:
    row, choices, right = PUBLISHED[name]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert set(read_text(file, DATA).taken_for) == {name}
    (question,) = read_questions(file, DATA)
    assert sorted(question["choices"]) == sorted(choices)
    assert question["choices"][question["answer"]] == right
    if name not in ("SciQ", "TruthfulQA", "TruthfulQA, generation"):
        assert question["choices"] == choices


def test_every_layout_has_an_example() -> None:
    assert set(PUBLISHED) | {"MedMCQA"} == {layout.name for layout in QUESTIONS}


def test_the_right_answer_of_sciq_is_not_always_at_the_same_place(tmp_path: Path) -> None:
    row, _, _ = PUBLISHED["SciQ"]
    rows = [row | {"question": f"What is {i}?"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(read_questions(tmp_path / "a.jsonl", DATA)["answer"]) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(1, 1), ("B", 1), ("1", 1), ("six", 2), (2.0, 2), (["six"], 2), ("A", 0)],
)
def test_an_answer_may_be_a_number_a_letter_or_the_text(tmp_path: Path, answer: object, expected: int) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"question": "?", "choices": ["four", "five", "six"], "answer": answer}]))
    assert read_questions(tmp_path / "a.json", DATA)["answer"] == [expected]


def test_an_answer_that_may_mean_two_choices_is_refused_until_settings_say_which(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"question": "2+1?", "choices": ["3", "4", "5", "6"], "answer": "3"}))
    with pytest.raises(DataFormatError, match=r"answer = '3' may be choice \[0, 3\]; say it by data.columns.answer-is"):
        read_questions(file, DATA)
    columns = Columns(question="question", choices="choices", answer="answer", answer_is="text")
    assert read_questions(file, DATA.model_copy(update={"columns": columns}))["answer"] == [0]


@pytest.mark.parametrize(("numbers", "first"), [([0, 1, 3], 0), ([1, 2, 4], 1)])
def test_medmcqa_is_counted_from_what_the_whole_set_shows(tmp_path: Path, numbers: list[int], first: int) -> None:
    rows = [{"question": f"{n}?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": n} for n in numbers]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"cop": -1}]))
    read = read_text(tmp_path / "a.jsonl", DATA)
    assert [samples[0]["answer"] for samples in read.samples] == [n - first for n in numbers]
    assert read.taken_for == {"MedMCQA": 4}
    assert read.left_out == [f"{tmp_path / 'a.jsonl'}, line 4"]
    (tmp_path / "b.jsonl").write_text(json.dumps(rows[1]))
    with pytest.raises(DataFormatError, match="may be counted from 0 or from 1"):
        read_questions(tmp_path / "b.jsonl", DATA)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"context": "", "question": "?", "answerA": "a", "answerC": "c", "label": "1"},
            "like SocialIQA and lacks .*'answerB'",
        ),
        ({"goal": "?", "sol1": "a", "label": 0}, "looks like PIQA and lacks the column 'sol2'; it has"),
        ({"ctx": "?", "label": 0}, "looks like HellaSwag and lacks the column 'endings'"),
        ({"question": "?", "choices": ["a", "b"]}, "looks like MMLU and lacks the column 'answer'"),
        ({"instruction": "Say"}, "looks like Alpaca and lacks the column 'output'"),
        ({"a": 1, "b": 2}, r"has the columns \['a', 'b'\]; known are the layouts of .* The row: \{'a': 1, 'b': 2\}"),
        ({"goal": "?", "sol1": "a", "sol2": " ", "label": 0}, r"sol2 = \[' '\] is not a list of texts"),
        ({"sentence": "?", "option1": "a", "option2": "b", "answer": "3"}, r"'3' in 'answer' is none of \[1, 2\]"),
        ({"question": "?", "passage": "x", "answer": "perhaps"}, r"'perhaps' in 'answer' is none of \[False, True\]"),
    ],
)
def test_what_is_missing_is_named_and_the_row_is_shown(tmp_path: Path, row: dict, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataFormatError, match=message):
        read_questions(tmp_path / "a.jsonl", DATA)


def test_columns_of_ones_own_are_mapped_by_settings(tmp_path: Path) -> None:
    row = {"frage": "Nass?", "text": "Wasser.", "eins": "nein", "zwei": "ja", "loesung": 2}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    columns = {
        "question": "frage",
        "context": "text",
        "choices": ["eins", "zwei"],
        "answer": "loesung",
        "answer-is": "one-based",
    }
    data = validated({"seed-model": "x", "data": {"source": "questions", "folder": "x", "columns": columns}}).data
    (question,) = read_questions(tmp_path / "a.jsonl", data)
    assert question == {"prompt": "Wasser.\nNass?\n- nein\n- ja\nAnswer:", "choices": ["nein", "ja"], "answer": 1}
    # Without choices, the answer is what is said.
    told = Columns(question="frage", answer="zwei")
    assert read_questions(tmp_path / "a.jsonl", data.model_copy(update={"columns": told}))["choices"] == [["ja"]]
    # By yes and no.
    (tmp_path / "b.jsonl").write_text(json.dumps({"frage": "Nass?", "stimmt": "false"}))
    truth = Columns(question="frage", answer="stimmt", answer_is="boolean")
    (question,) = read_questions(tmp_path / "b.jsonl", data.model_copy(update={"columns": truth}))
    assert (question["choices"], question["answer"]) == (["no", "yes"], 0)
    (tmp_path / "c.jsonl").write_text(json.dumps({"frage": "Nass?", "eins": "x"}))
    with pytest.raises(DataFormatError, match=r"looks like data.columns and lacks the column 'zwei' and 'loesung'"):
        read_questions(tmp_path / "c.jsonl", data)
    with pytest.raises(InvalidSettingError, match=r"data.columns.question = 'q' needs data.columns.answer"):
        validated({"data": {"columns": {"question": "q"}}})


ROWS = [{"question": f"Größe {i}?", "choices": ["ä, b", "c\nd"], "answer": i % 2} for i in range(3)]


def as_csv(delimiter: str, end: str) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=end)
    writer.writerow(["question", "choices", "answer"])
    writer.writerows([row["question"], json.dumps(row["choices"]), row["answer"]] for row in ROWS)
    return stream.getvalue()


LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
FILES = {
    "lines.jsonl": "\n".join(LINES).encode(),
    "windows.jsonl": ("\ufeff" + "\r\n".join(LINES) + "\r\n").encode(),
    "old.jsonl": "\r".join(LINES).encode(),
    "wide.jsonl": "\n".join(LINES).encode("utf-16"),
    "list.json": json.dumps(ROWS).encode(),
    "within.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode("utf-8-sig"),
    "lines.json": "\n".join(LINES).encode(),
    "commas.csv": as_csv(",", "\r\n").encode("utf-8-sig"),
    "semicolons.csv": as_csv(";", "\n").encode(),
    "old.csv": as_csv(",", "\r").encode(),
    "tabs.tsv": as_csv("\t", "\n").encode(),
}


@pytest.mark.parametrize("name", [*FILES, "table.parquet"])
def test_files_of_every_kind_hold_the_same_questions(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name in FILES:
        file.write_bytes(FILES[name])
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), file)
    questions = read_questions(file, DATA)
    assert questions["answer"] == [0, 1, 0]
    assert questions["choices"] == [["ä, b", "c\nd"]] * 3
    assert questions[2]["prompt"].startswith("Größe 2?\n")


def test_text_in_another_encoding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(as_csv(",", "\n").encode("cp1252"))
    with pytest.raises(InputFileError, match=r"it is not UTF-8 .* save it as UTF-8"):
        read_questions(tmp_path / "a.csv", DATA)


def test_rows_without_a_label_or_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Say", "input": "", "output": ""},
        {"instruction": "Say", "input": "", "output": "No."},
        {"question": "?", "choices": ["a", "b"], "answer": None},
        {"question": "?", "choices": ["a", "b"], "answer": -1},
        PUBLISHED["HellaSwag"][0] | {"label": ""},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_text(tmp_path / "a.jsonl", DATA)
    assert [int(place.split()[-1]) for place in read.left_out] == [1, 3, 4, 5]
    assert [sample["choices"] for (sample,) in read.samples] == [["No."]]
    assert read.taken_for == {"Alpaca": 2, "MMLU": 2, "HellaSwag": 1}


def test_parts_by_other_names_and_in_several_files(tmp_path: Path) -> None:
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "dev", "pets_test")):
        parquet.write_table(pa.Table.from_pylist(ROWS * (number + 1)), tmp_path / f"{name}.parquet")
    data = Data(source="questions", folder=str(tmp_path.parent))
    name = tmp_path.name
    assert {split: len(load_questions(data, name, split, "")) for split in ("train", "validation", "test")} == {
        "train": 9,
        "validation": 9,
        "test": 12,
    }
    other = data.model_copy(update={"splits": data.splits.model_copy(update={"train": "dev", "test": "pets_test"})})
    assert len(load_questions(other, name, "test", "")) == 12
    assert len(load_questions(other, name, "train", "")) == 8


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["A", "B", "1", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "label", "choices", "labels", "role", "content", "stem"]), inner, max_size=3)
    ),
    max_leaves=6,
)
COLUMNS = sorted({path.split(".")[0] for layout in (*QUESTIONS, *TEXTS) for path in (*layout.needed, layout.context) if path})


def check_row(row: dict, data: Data, tmp_path: Path) -> None:
    """Through a file, as all rows come; and nothing is lost without being counted."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    try:
        read = read_text(file, data)
    except DataFormatError as error:
        if "line 1" not in str(error) and "a.jsonl" not in str(error):
            raise AssertionError(f"{error} names no place") from error
        return
    assert len(read.samples) + len(read.left_out) == 1
    for sample in (sample for samples in read.samples for sample in samples):
        assert 0 <= sample["answer"] < len(sample["choices"])
        assert all(choice.strip() for choice in sample["choices"])
    assert len(read_questions(file, data)) == sum(map(len, read.samples))


def rows_of(number: int) -> st.SearchStrategy[dict]:
    """Rows with all columns of a layout, of which some are changed; or of any columns."""
    layout = (*QUESTIONS, *TEXTS)[number]
    needed = sorted({path.split(".")[0] for path in layout.needed})
    return st.fixed_dictionaries(
        dict.fromkeys(needed, values), optional={name: values for name in COLUMNS if name not in needed}
    )


any_row = st.integers(0, len((*QUESTIONS, *TEXTS)) - 1).flatmap(rows_of) | st.dictionaries(
    st.sampled_from(COLUMNS), values, max_size=8
)
QUICK = hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@QUICK
@given(any_row, st.sampled_from(["questions", "text"]))
def test_any_row_is_a_sample_or_refused(tmp_path_factory: pytest.TempPathFactory, row: dict, source: str) -> None:
    check_row(row, Data(source=source, folder="x"), tmp_path_factory.getbasetemp())


@pytest.mark.slow
@hypothesis_settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(any_row, st.sampled_from(["questions", "text"]))
def test_ten_thousand_rows_are_samples_or_refused(tmp_path_factory: pytest.TempPathFactory, row: dict, source: str) -> None:
    check_row(row, Data(source=source, folder="x"), tmp_path_factory.getbasetemp())


@QUICK
@given(st.lists(st.tuples(st.sampled_from(["whole", "unlabelled", "unanswered"]), st.integers(0, 9)), min_size=1, max_size=12))
def test_every_row_of_a_file_is_used_or_named(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    asked = {"question": "Wet?", "choices": ["fire", "water"]}
    made = {
        "whole": lambda n: asked | {"answer": n % 2},
        "unlabelled": lambda n: asked | {"answer": ["", -1][n % 2]},
        "unanswered": lambda n: {"instruction": f"say {n}", "output": ""},
    }
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_text("".join(json.dumps(made[kind](number)) + "\n" for kind, number in rows))
    read = read_text(file, Data(source="questions", folder="x"))
    left_out = [f"{file}, line {i}" for i, (kind, _) in enumerate(rows, start=1) if kind != "whole"]
    assert read.left_out == left_out
    assert len(read.samples) + len(left_out) == sum(read.taken_for.values()) == len(rows)


def check_bytes(folder: Path, name: str, content: bytes) -> None:
    file = folder / name
    file.write_bytes(content)
    with contextlib.suppress(DataFormatError, InputFileError):
        assert all(isinstance(row, dict) for _, row in read_rows(file))


names = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"])
starts = st.sampled_from([*FILES.values(), b""])


@QUICK
@given(names, starts, st.binary(max_size=60))
def test_any_bytes_are_rows_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, start: bytes, content: bytes
) -> None:
    check_bytes(tmp_path_factory.getbasetemp(), name, start[:-1] + content)


@pytest.mark.slow
@hypothesis_settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(names, starts, st.binary(max_size=200), st.floats(0, 1))
def test_two_thousand_files_are_rows_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, start: bytes, content: bytes, kept: float
) -> None:
    check_bytes(tmp_path_factory.getbasetemp(), name, start[: int(kept * len(start))] + content)
