"""A run on text that is no question: instructions, conversations and documents as private domains."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from metamoe.ask import prompt_ids
from metamoe.client.folder import check_questions, read_question_folder
from metamoe.common.config import Data
from metamoe.common.errors import PrivateDataError
from metamoe.common.model.artifact import load_model
from metamoe.simulations.train_seed import tokenizer_for

WORDS = ["SAY", "ONE", "TWO", "BLACK", "WHITE", "CIRCLE", "SQUARE"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder with a chat template."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = tokenizer_for([" ".join(WORDS)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}SAY "
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=3, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")

    def said(number: int) -> tuple[str, str]:
        first, second, third = (WORDS[(number // 7**i) % 7] for i in range(3))
        return f"{first} {second}", f"{third} {first}"

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).mkdir()
        (folder / name / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    asked = [said(7 * i) for i in range(40)]
    write("told", [{"instruction": prompt, "output": answer} for prompt, answer in asked])
    roles = ("user", "assistant")
    write("chats", [{"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]} for pair in asked])
    write("texts", [{"text": f"{prompt} {answer} {prompt}"} for prompt, answer in asked])
    write("public", [{"instruction": prompt, "output": answer} for prompt, answer in map(said, range(120))])
    return folder


def test_a_run_on_text_reports_perplexity_and_what_is_told_apart(
    decoder: Path, data: Path, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    small = {
        "seed-model": decoder,
        "data.domains": '["told", "chats", "texts"]',
        "data.public": "public",
        "data.public-samples": 60,
        "data.block-words": 2,
        "data.test-samples": 8,
        "proxies.count": 8,
        "proxies.pool": 40,
        "lora.rank": 2,
        "lora.first-layer": 1,
        "expert-training.epochs": 1,
    }
    options = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    command = ("simulate", "--preset", "instructions", "--data-dir", str(data), "--backend", "local", "--out", str(out))
    assert run_metamoe(*command, *options) == 0
    shown = capsys.readouterr().out
    assert "told from three others' answers on test data, %" in shown
    assert "perplexity" in shown
    results = json.loads((out / "results.json").read_text())
    for by_set in results["metrics"].values():
        assert set(by_set) == {"told", "chats", "texts", "public"}
        assert all(found["perplexity"] > 1 and found["macro_f1"] is None for found in by_set.values())
        assert all(found["count"] == 8 for found in by_set.values())
    # Of one answer in four, and not of the only one.
    assert any(found["accuracy"] < 100 for found in results["metrics"]["zero-shot"].values())
    worst = results["accuracy"]["metamoe"]
    assert worst[results["worst_domain"]["metamoe"]] == min(worst[name] for name in ("told", "chats", "texts"))
    report = (out / "report.md").read_text()
    assert "## Told from others' answers on test data, %" in report
    assert "## Perplexity of held-out answers" in report
    # What the client found is what the table says.
    own = json.loads((out / "clients" / "chats" / "accuracy.json").read_text())
    assert own["metrics"]["perplexity"] == pytest.approx(results["metrics"]["metamoe"]["chats"]["perplexity"], rel=1e-3)

    file = data / "chats" / "all.jsonl"
    assert run_metamoe("evaluate", str(out / "model"), "--data", str(file), "--json") == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["count"] == 40
    assert evaluated["metrics"]["perplexity"] > 1
    assert run_metamoe("evaluate", str(out / "model"), "--data", str(file)) == 0
    assert "told from others' answers: " in capsys.readouterr().out
    # A prompt goes through the chat template too.
    loaded = load_model(out / "model")
    assert prompt_ids(loaded, "ONE") == loaded.seed.tokenizer("ONE SAY ", add_special_tokens=False)["input_ids"]
    assert run_metamoe("generate", str(out / "model"), "ONE", "--max-tokens", "2") == 0


def test_a_folder_is_checked_with_the_prompts_that_a_model_sees(
    decoder: Path, data: Path, tmp_path: Path, run_metamoe, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = ("--preset", "instructions", "--set", f"seed-model={decoder}", "--set", f"data.folder={data}")
    assert run_metamoe("data", "check", str(data / "chats"), *preset, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["source"], found["counts"]) == ("text", {"train": {"conversations (messages)": 40}})
    assert len(found["prompts"]) == 3
    assert found["prompts"][0]["prompt"].upper().split() == ["SAY", "SAY", "SAY"]

    # What there is decides, where settings do not.
    assert run_metamoe("data", "check", str(data / "texts"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"train": {"documents": 40}}
    (tmp_path / "a.csv").write_text("goal,sol1,sol2,label\nOpen it,push,pull,1\nShut it,push,pull,\n")
    assert run_metamoe("data", "check", str(tmp_path / "a.csv")) == 0
    shown = capsys.readouterr().out
    assert "data.source = questions" in shown
    assert "PIQA" in shown
    assert "Open it\n- push\n- pull\nAnswer:\n   push\n-> pull" in shown
    assert f"1 left out, without a label or an answer: {tmp_path / 'a.csv'}, line 3" in shown
    assert run_metamoe("data", "check", str(tmp_path / "none")) != 0
    assert "none is not there" in capsys.readouterr().err


def test_a_clients_own_text_is_read_by_the_same_rules(tmp_path: Path, data: Path) -> None:
    settings = Data(source="text", private="own", folder="unused")
    rows = (data / "chats" / "all.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows + json.dumps({"instruction": "SAY", "output": ""}) + "\n")
    found = check_questions(tmp_path, settings)
    assert found.counts == {"train": {"conversations (messages)": 40, "Alpaca": 1}}
    assert found.unusual == {"left out, without a label or an answer": [f"{tmp_path / 'train.jsonl'}, line 41"]}
    assert found.wrong == [f"{tmp_path} has no test part, such as test.jsonl"]
    assert len(read_question_folder(tmp_path, "train", settings)) == 40
    (tmp_path / "test.jsonl").write_text('{"messages": 1}\n')
    with pytest.raises(PrivateDataError, match=r"test\.jsonl, line 1: messages is not a list"):
        read_question_folder(tmp_path, "test", settings)
