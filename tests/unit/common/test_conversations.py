"""Text that is no question: what is a prompt and what an answer, what it is told from, and how good it is."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from metamoe.common.config import Data
from metamoe.common.data.conversations import blocks_of, texts_of
from metamoe.common.data.metrics import answered, interval, metrics_of, said
from metamoe.common.data.questions import load_questions, read_questions, with_distractors
from metamoe.common.data.tasks import ImageSamples, TextSamples
from metamoe.common.data.text import Question, chat_ids, tokenised
from metamoe.common.errors import DataFormatError, InputFileError
from metamoe.simulations.train_seed import tokenizer_for

DATA = Data(source="text", folder="unused", block_words=3)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " See you "},
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }} "
    "{% endfor %}{% if add_generation_prompt %}GO {% endif %}"
)


def test_each_answer_of_a_conversation_is_a_sample_with_all_that_was_said_before() -> None:
    name, samples = texts_of({"messages": CHAT}, "here", DATA)
    assert name == "conversations (messages)"
    assert [sample["choices"] for sample in samples] == [["Hello"], ["See you"]]
    assert samples[0]["turns"] == CHAT[:2]
    assert samples[1]["prompt"] == "System: Be short.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"


def test_other_names_of_roles_and_columns() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert texts_of(row, "here", DATA)[1][0]["turns"] == [{"role": "user", "content": "Hi"}]
    parts = {"messages": [CHAT[1], {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]}
    assert texts_of(parts, "here", DATA)[1][0]["choices"] == ["Hello"]
    # A conversation without an answer, or with an empty one, has no sample.
    assert texts_of({"messages": CHAT[:2]}, "here", DATA)[1] == []
    assert texts_of({"messages": [CHAT[1], {"role": "assistant", "content": " "}]}, "here", DATA)[1] == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hi"}, "messages is not a list of messages"),
        ({"messages": []}, "messages is not a list of messages"),
        ({"messages": [{"role": "judge", "content": "x"}]}, r"here: messages has .*judge.*; wanted is a role \(user, human"),
        ({"messages": [{"role": "user", "content": None}]}, "with its content, a text"),
        ({"messages": ["Hi"]}, "wanted is a role"),
        ({"text": 3}, "text = 3 is not text"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "known are the layouts of conversations"),
    ],
)
def test_what_is_no_conversation_is_named(row: dict, message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        texts_of(row, "here", DATA)


def test_a_document_is_cut_into_blocks_of_which_each_follows_the_one_before() -> None:
    blocks = blocks_of("a b c d  e\nf g", 3)
    assert [(block["prompt"], block["choices"]) for block in blocks] == [("a b c", ["d  e\nf"]), ("d  e\nf", ["g"])]
    # One block is cut in the middle; a word by itself is after nothing.
    assert [(block["prompt"], block["choices"]) for block in blocks_of("a b c", 3)] == [("a b", ["c"])]
    assert blocks_of("alone", 3) == []


def test_no_conversation_and_no_document_is_in_two_parts(tmp_path: Path) -> None:
    (tmp_path / "chats").mkdir()
    rows = [{"messages": [m | {"content": f"{m['content']} {i}"} for m in CHAT]} for i in range(20)]
    (tmp_path / "chats" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(f"w{i}" for _ in range(9)))
    data = DATA.model_copy(update={"folder": str(tmp_path)})
    for name, samples in (("chats", 2), ("texts", 2)):
        parts = {split: load_questions(data, name, split, "") for split in ("train", "validation", "test")}
        assert {split: len(part) for split, part in parts.items()} == {
            "train": 14 * samples,
            "validation": 2 * samples,
            "test": 4 * samples,
        }
        last = {split: {choices[0].split()[-1] for choices in part["choices"]} for split, part in parts.items()}
        assert not last["train"] & last["test"]
    folders = tmp_path / "folders"
    for part in ("train", "test"):
        (folders / part).mkdir(parents=True)
        (folders / part / "a.txt").write_text("a b c d e f")
    assert len(load_questions(data, "folders", "test", "")) == 1
    (tmp_path / "texts" / "0.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputFileError, match=r"0\.txt cannot be read as UTF-8"):
        read_questions(tmp_path / "texts" / "0.txt", data)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_for(["SAY YES", "GO NO", "WHITE CIRCLE", "BLACK SQUARE"])


def test_a_chat_template_makes_the_prompt_where_there_is_one(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "SAY", "output": "YES"}))
    data = read_questions(tmp_path / "a.jsonl", DATA)
    (plain,) = tokenised(tokenizer, DATA, data)
    assert plain.prompt == tokenizer("SAY\nAnswer:")["input_ids"]
    tokenizer.chat_template = TEMPLATE
    (chat,) = tokenised(tokenizer, DATA, data)
    assert chat.prompt == tokenizer("SAY GO ", add_special_tokens=False)["input_ids"]
    assert chat.choices == [tokenizer("YES", add_special_tokens=False)["input_ids"]]
    with pytest.raises(DataFormatError, match="refuses a conversation of the roles system: no system"):
        chat_ids(tokenizer, CHAT[:1])
    # Documents have no turns, and no template.
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "SAY YES"}))
    (document,) = tokenised(tokenizer, DATA, read_questions(tmp_path / "b.jsonl", DATA))
    assert document.prompt == tokenizer("SAY")["input_ids"]


def test_distractors_leave_questions_with_choices_as_they_are(tmp_path: Path) -> None:
    rows = [{"question": "?", "choices": ["a", "b"], "answer": 1}] + [
        {"instruction": f"Say {i}", "output": f"{i}"} for i in range(5)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = with_distractors(read_questions(tmp_path / "a.jsonl", Data(source="questions", folder="x")))
    assert questions[0]["choices"] == ["a", "b"]
    assert all(len(question["choices"]) == 4 for question in list(questions)[1:])


def test_perplexity_by_hand() -> None:
    # Three answers of 1, 3 and 2 tokens with mean log-likelihoods -1, -2 and -3: (1 + 6 + 6) / 6 a token.
    samples = TextSamples([Question([1], [[5] * 2, [6] * n], 1) for n in (1, 3, 2)], end=0)
    scores = torch.tensor([[-9.0, -1.0], [-1.0, -2.0], [-9.0, -3.0]])
    found = metrics_of(answered(lambda batch: scores[: len(batch.inputs.ids)], samples), samples)
    assert found.perplexity == pytest.approx(math.exp(13 / 6), abs=1e-4)
    assert found.accuracy == 66.67
    assert (found.macro_f1, found.balanced_accuracy) == (None, None)


def test_metrics_of_classes_by_hand() -> None:
    # Of class 0 three in four are recognised, of class 1 one in two; nothing is ever named class 2, of which there is none.
    answers = torch.tensor([0, 0, 0, 0, 1, 1])
    chosen = torch.tensor([0, 0, 0, 1, 1, 0])
    scores = torch.full((6, 3), -50.0)
    # Confidence 0.75 each.
    scores[torch.arange(6), chosen] = math.log(3.0)
    scores[torch.arange(6), 1 - chosen] = 0.0
    samples = ImageSamples(torch.zeros(6, 3, 1, 1), answers, torch.zeros(3, 2))
    told = said(scores, answers, text=False)
    # Log-likelihoods of 3/4 and 1/4, whichever was right.
    assert told.likelihood.exp().tolist() == pytest.approx([0.75, 0.75, 0.75, 0.25, 0.75, 0.25])
    found = metrics_of(told, samples)
    assert found.accuracy == 66.67
    assert found.balanced_accuracy == 62.5
    # F1 of class 0: 2 * 3 / (2 * 3 + 1 + 1); of class 1: 2 * 1 / (2 * 1 + 1 + 1).
    assert found.macro_f1 == 62.5
    assert found.calibration_error == pytest.approx(75 - 66.67, abs=0.01)
    assert found.interval == tuple(round(end, 2) for end in interval(4, 6))
    assert found.perplexity is None
