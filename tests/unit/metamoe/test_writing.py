"""What a unified decoder goes on to say: stop texts, chats, long prompts, pieces, and the commands that ask for them."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import metamoe
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.model.generation import Decoding, Step
from metamoe.writing import TextStream, Writing, end_tokens, text_request, written

PROMPTS = ["Where do fish live?", "a", "größer als 7 °C – und dann?", "one two three four five six seven"]


def same(found: list[metamoe.Continuation], expected: list[metamoe.Continuation]) -> None:
    """Texts are the same; of weights, sums in another order have other last digits."""
    assert [(one.prompt, one.text, one.reason) for one in found] == [(one.prompt, one.text, one.reason) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert dict(one.experts) == pytest.approx(dict(other.experts), abs=1e-5)


def test_many_prompts_get_what_each_gets_alone(model: metamoe.Model) -> None:
    found = model.generate(PROMPTS, max_tokens=20)
    same(found, [model.generate(prompt, max_tokens=20) for prompt in PROMPTS])
    assert len({one.text for one in found}) == len(PROMPTS)
    for one in found:
        assert one.text == "".join(model.stream(one.prompt, 20))
        # Two experts a token, whose weights sum to one; decided once, so the same for all.
        assert len(one.experts) == 2
        assert sum(weight for _, weight in one.experts) == pytest.approx(1, abs=1e-5)
        assert one.experts[0][0] == model.route(one.prompt).expert
    drawn = model.generate(PROMPTS, 20, temperature=1.0, top_p=0.9, seed=5)
    same(drawn, [model.generate(prompt, 20, temperature=1.0, top_p=0.9, seed=5) for prompt in PROMPTS])
    assert all(one.text != other.text for one, other in zip(drawn, found, strict=True))


def test_a_text_ends_before_the_first_stop_text(model: metamoe.Model) -> None:
    whole = model.generate(PROMPTS[0], 40)
    assert whole.reason == "length"
    for start in (0, 5, 11):
        stop = whole.text[start : start + 3]
        cut = model.generate(PROMPTS[0], 40, stop=["never", stop])
        assert (cut.text, cut.reason) == (whole.text[: whole.text.index(stop)], "stop")
    together = model.generate(PROMPTS, 40, stop=[whole.text[5:8]])
    same(together, [model.generate(prompt, 40, stop=[whole.text[5:8]]) for prompt in PROMPTS])


def test_what_may_begin_a_stop_text_or_is_part_of_a_letter_is_held_back(model: metamoe.Model) -> None:
    tokens = model.loaded.seed.tokenizer("xé ENxy ENDz")["input_ids"]
    stream, nothing = TextStream(model.loaded, ["END"]), torch.zeros(1, 4)
    pieces = [stream.piece(Step(token, nothing, None)) for token in tokens[:-1]]
    assert [piece.text for piece in pieces] == ["x", "", "é", " ", "", "", "ENx", "y", " ", "", "", ""]
    assert [piece.reason for piece in pieces] == [None] * 11 + ["stop"]
    unfinished = TextStream(model.loaded, ["END"])
    last = [unfinished.piece(Step(t, nothing, "length" if i == 1 else None)) for i, t in enumerate(tokens[4:6])]
    assert [piece.text for piece in last] == ["", "EN"]


def test_a_chat_is_put_into_the_template(model: metamoe.Model) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go"}]
    asked = "<user>Hi\n<assistant>Yes?\n<user>Go\n<assistant>"
    assert model.chat(messages, 8).text == model.generate(asked, 8).text == "".join(model.stream(messages, 8))
    with pytest.raises(InputFileError, match="chat template does not take these messages: no system here"):
        model.chat([{"role": "system", "content": "Be kind"}])


def test_a_long_prompt_is_refused_or_loses_its_beginning(model: metamoe.Model) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(124))
    assert len(text_request(model.loaded, text, Writing(4)).prompt) == 124
    with pytest.raises(InputFileError, match="a prompt of 124 tokens and max_tokens = 5 are more than 128 together"):
        model.generate(text, 5)
    assert model.generate(text, 28, truncate=True).text == model.generate(text[-100:], 28).text
    with pytest.raises(InputFileError, match="max_tokens = 128 are more than 128"):
        model.generate(text, 128, truncate=True)


def test_a_text_ends_at_the_end_tokens_of_tokenizer_and_model(model: metamoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_tokens(model.loaded) == {256}
    decoding = Decoding(model.loaded.model, frozenset())
    decoding.add({0: text_request(model.loaded, "a", Writing(9))})
    second = decoding.step()[0].token
    monkeypatch.setattr(model.loaded.seed.model.generation_config, "eos_token_id", [second])
    assert end_tokens(model.loaded) == {256, second}
    assert model.generate("a", 9).reason == "stop"
    monkeypatch.undo()
    assert model.generate("a", 9).reason == "length"


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "temperature": ({"temperature": -1}, "temperature = -1"),
    "not a number": ({"temperature": float("nan")}, "temperature = nan"),
    "top_p": ({"top_p": 0}, "top_p = 0"),
    "seed": ({"seed": -1}, "seed = -1"),
    "stop": ({"stop": [""]}, "stop = "),
    "tokens": ({"max_tokens": 0}, "max_tokens = 0: at least 1"),
    "unknown": ({"top_k": 3}, "top_k = 3: there is no such option"),
}


@pytest.mark.parametrize(("how", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_named(how: dict[str, object], message: str, model: metamoe.Model) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        model.generate("a", **how)  # type: ignore[call-overload]


def test_more_prompts_than_are_computed_at_once_wait(model: metamoe.Model) -> None:
    few = list(written(model.loaded, PROMPTS, Writing(6), at_once=2))
    assert {number for number, _ in few[:6]} == {0, 1}
    texts = ["".join(piece.text for number, piece in few if number == n) for n in range(4)]
    assert texts == [one.text for one in model.generate(PROMPTS, 6)]


RunMetamoe = Callable[..., int]


def test_prompts_come_as_arguments_from_a_file_or_from_standard_input(
    model: metamoe.Model,
    run_metamoe: RunMetamoe,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = model.generate(PROMPTS, 6)
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    common = ("--quiet", "generate", str(model.folder))
    for file in ("prompts.txt", "prompts.jsonl"):
        assert run_metamoe(*common, "--file", str(tmp_path / file), "--max-tokens", "6", "--json") == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["prompt"], line["text"], line["reason"]) for line in lines] == [
            (one.prompt, one.text, one.reason) for one in expected
        ]
        assert [line["experts"] for line in lines] == [dict(one.experts) for one in expected]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nGo\n"))
    assert run_metamoe(*common, "--chat", "--max-tokens", "6", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [model.chat([{"role": "user", "content": c}], 6).text for c in ("Hi", "Go")]
    assert run_metamoe(*common, PROMPTS[0], "--max-tokens", "6") == 0
    assert capsys.readouterr().out == expected[0].text + "\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: : Invalid JSON"),
        ('{"prompt": 3}', "line 2: prompt"),
        ("{}", "line 2: expected"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "line 2: expected"),
    ],
)
def test_a_wrong_line_of_prompts_is_named(
    line: str, message: str, model: metamoe.Model, run_metamoe: RunMetamoe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    assert run_metamoe("generate", str(model.folder), "--file", str(file)) == InputFileError.exit_code
    assert message in capsys.readouterr().err


def test_a_chat_remembers_what_was_said(
    model: metamoe.Model, run_metamoe: RunMetamoe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nGo\n\nnever read\n"))
    assert run_metamoe("--quiet", "chat", str(model.folder), "--max-tokens", "5") == 0
    messages = [{"role": "user", "content": "Hi"}]
    first = model.chat(messages, 5).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Go"}]
    assert capsys.readouterr().out == f"{first}\n{model.chat(messages, 5).text}\n"
