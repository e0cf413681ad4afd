"""Questions from files in the forms in which they are published, and what is wrong with others."""

import gzip
import json
from pathlib import Path

import pytest

from metamoe.common.config import Data, ListChoices, Settings
from metamoe.common.data.datasets import evaluation_sets, fingerprint, held_out_public, load_private, load_public
from metamoe.common.data.layouts import INSTRUCTIONS, QUESTIONS, layout_of
from metamoe.common.data.questions import load_questions, read_questions, with_distractors
from metamoe.common.data.rows import question_of
from metamoe.common.data.text import tokenised
from metamoe.common.errors import DataFormatError, InputFileError, InvalidSettingError
from metamoe.common.presets import changed, load_settings

QUESTIONS_DATA = Data(source="questions", folder="unused")
OURS = {"context": "", "question": "What is wet?", "choices": ["fire", "water"], "answer": 1}


def question_row(row: dict, place: str, list_choices: ListChoices) -> dict | None:
    return question_of(row, layout_of(row, place, (*QUESTIONS, *INSTRUCTIONS)), place, list_choices)


@pytest.mark.parametrize(
    "row",
    [
        OURS,
        {"question": "What is wet?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, "answerKey": "B"},
        {"context": " ", "question": "What is wet? ", "choices": [" fire", "water "], "answer": 1, "id": "7"},
    ],
)
def test_every_form_gives_the_same_question(row: dict) -> None:
    expected = {"prompt": "What is wet?\n- fire\n- water\nAnswer:", "choices": ["fire", "water"], "answer": 1}
    assert question_row(row, "here", "always") == expected


def test_the_forms_of_cosmosqa_socialiqa_and_alpaca() -> None:
    cosmos = {"context": "It rained.", "question": "Why?", "label": 2} | {f"answer{i}": f"answer {i}" for i in range(4)}
    social = {"context": "It rained.", "question": "Why?", "label": "3"} | {f"answer{c}": f"answer {c}" for c in "ABC"}
    first, second = question_row(cosmos, "here", "always"), question_row(social, "here", "always")
    assert first is not None
    assert second is not None
    assert (first["answer"], len(first["choices"])) == (2, 4)
    assert (second["answer"], second["choices"][2]) == (2, "answer C")
    assert first["prompt"].startswith("It rained.\nWhy?\n- answer 0\n")
    unlisted = question_row(social, "here", "where-needed")
    assert unlisted == second | {"prompt": "It rained.\nWhy?\nAnswer:"}
    # What speaks of the other choices makes no sense without them.
    spoken = cosmos | {"answer3": "None of the above choices ."}
    assert question_row(spoken, "here", "where-needed") == question_row(spoken, "here", "always")
    told = question_row({"instruction": "Name a fish.", "input": "", "output": "Pike"}, "here", "always")
    assert told == {"prompt": "Name a fish.\nAnswer:", "choices": ["Pike"], "answer": 0}


@pytest.mark.parametrize("row", [OURS | {"answer": -1}, OURS | {"answer": ""}])
def test_a_question_without_a_label_is_left_out(row: dict) -> None:
    assert question_row(row, "here", "always") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "?"},
            r"here has the columns \['text'\]; known are the layouts of CosmosQA, .*The row: \{'text': '\?'\}",
        ),
        (OURS | {"answer": 2}, r"here: the answer 2 in 'answer' is none of \[0, 1\]"),
        (OURS | {"answer": True}, "the answer True in 'answer' is none of"),
        (OURS | {"choices": ["a", 3]}, "is not a list of texts"),
        (OURS | {"choices": ["a", " "]}, "is not a list of texts"),
        (OURS | {"question": None}, "question = None is not text"),
        (
            {"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "C"},
            r"'C' in 'answerKey' is none of \['A'\]",
        ),
        ({"instruction": "x", "output": 3}, "output = 3 is not text"),
    ],
)
def test_what_is_no_question_is_named(row: dict, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        question_row(row, "here", "always")


def write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


def numbered(count: int) -> list[dict]:
    return [OURS | {"question": f"Number {i}?", "answer": i % 2} for i in range(count)]


def test_a_single_file_is_divided_the_same_way_every_time(tmp_path: Path) -> None:
    write(tmp_path / "pets", "all.jsonl.gz", numbered(100))
    data = Data(source="questions", folder=str(tmp_path), domains=("pets",))
    parts = {split: load_questions(data, "pets", split, "") for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 72, "validation": 8, "test": 20}
    assert len({prompt for part in parts.values() for prompt in part["prompt"]}) == 100


def test_parts_that_are_there_are_taken(tmp_path: Path) -> None:
    write(tmp_path / "pets", "train.jsonl", numbered(20))
    write(tmp_path / "pets", "validation.jsonl", numbered(5))
    write(tmp_path / "pets", "test.jsonl", [OURS | {"answer": -1}] * 3)
    data = Data(source="questions", folder=str(tmp_path), domains=("pets",))
    # A test part without labels is none: what was for validation tests, and some of what trains is for validation.
    sizes = {split: len(load_questions(data, "pets", split, "")) for split in ("train", "validation", "test")}
    assert sizes == {"train": 18, "validation": 2, "test": 5}


def test_missing_files_and_bad_lines_are_named(tmp_path: Path) -> None:
    data = Data(source="questions", folder=str(tmp_path), domains=("pets",))
    with pytest.raises(InputFileError, match=r"pets has 0 files of JSON lines, .* expected are train.jsonl"):
        load_questions(data, "pets", "train", "")
    (tmp_path / "pets").mkdir()
    (tmp_path / "pets" / "x.jsonl").write_text(json.dumps(OURS) + "\n{broken\n")
    with pytest.raises(DataFormatError, match=r"x.jsonl, line 2 is not JSON"):
        load_questions(data, "pets", "train", "")


def test_held_out_instructions_have_the_outputs_of_three_others_beside_their_own(tmp_path: Path) -> None:
    write(tmp_path, "told.jsonl", [{"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(9)])
    questions = with_distractors(read_questions(tmp_path / "told.jsonl", QUESTIONS_DATA))
    for row, question in enumerate(questions):
        assert len(set(question["choices"])) == 4
        assert question["choices"][question["answer"]] == f"{row}"
    assert len(set(questions["answer"])) > 1


def test_a_run_finds_its_data(tmp_path: Path) -> None:
    for domain in ("one", "two"):
        write(tmp_path / domain, "all.jsonl", numbered(100))
    write(tmp_path / "told", "all.jsonl", [{"instruction": f"Say {i}", "input": "", "output": f"{i}"} for i in range(50)])
    chosen = [f"data.folder={tmp_path}", 'data.domains=["one", "two"]', "data.public=told", "data.source=questions"]
    settings = load_settings("glyphs", [*chosen, "clients=4", "data.test-samples=10", "data.private-samples=20"])
    parts = [load_private(settings, client, "train") for client in range(4)]
    assert all(0 < len(part) <= 20 for part in parts)
    # Two clients of a domain share its questions, and have none in common.
    assert not set(parts[0]["prompt"]) & set(parts[2]["prompt"])
    assert {name: len(part) for name, part in evaluation_sets(settings.data).items()} == {"one": 10, "two": 10}
    assert (len(load_public(settings.data)), len(held_out_public(settings.data))) == (36, 10)
    assert fingerprint(load_public(settings.data)) != fingerprint(parts[0])


def test_data_that_nobody_said_where_to_find_is_refused(settings: Settings) -> None:
    with pytest.raises(InvalidSettingError, match=r"data.source = questions needs data.folder \(--data-dir\)"):
        changed(settings, ["data.source=questions"])
    with pytest.raises(InvalidSettingError, match="which is built in"):
        changed(settings, ["data.folder=somewhere"])


def test_long_prompts_keep_their_end_and_long_answers_their_beginning() -> None:
    def words(text: str, **_options: bool) -> dict:
        return {"input_ids": [int(word) for word in text.split()]}

    data = Data(prompt_tokens=3, answer_tokens=2)
    (question,) = tokenised(words, data, [{"prompt": "1 2 3 4 5", "choices": ["6 7 8", "9"], "answer": 1}])
    assert (question.prompt, question.choices, question.answer) == ([3, 4, 5], [[6, 7], [9]], 1)


def test_a_text_that_the_tokenizer_cannot_read_is_named() -> None:
    def numbers(text: str, **_options: bool) -> dict:
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}

    for prompt, choices, named in (("1 2", ["3", "oven"], "' oven'"), ("bread", ["3"], "'bread'")):
        with pytest.raises(DataFormatError, match=f"no token of {named}"):
            tokenised(numbers, Data(), [{"prompt": prompt, "choices": choices, "answer": 0}])
