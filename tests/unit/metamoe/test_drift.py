"""Inputs that are near to no client."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import metamoe
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.model.inputs import Tokens
from metamoe.drift import nearness
from tests.unit.metamoe.conftest import byte_model


def test_an_input_is_no_clients_where_the_public_set_is_likelier_than_their_mean() -> None:
    # Likelihoods 1, 3 and, of the public set, 4 and then 1: against the clients' mean, 2. The seed's odds are e^-8 beside.
    for public, expected in ((4.0, 4 / 6), (1.0, 1 / 3)):
        scores = torch.tensor([[[1.0, 3.0, public]]]).log() + torch.tensor([0.0, 0.0, -8.0])
        foreign, nearest = nearness(scores.log_softmax(-1), -8.0, torch.zeros(1, 3, 2, 2))
        assert (foreign.item(), nearest.item()) == (pytest.approx(expected, abs=1e-6), 1)


def test_of_a_prompt_only_its_own_tokens_count() -> None:
    near, far = torch.tensor([9.0, 1.0, 0.0]).log_softmax(-1), torch.tensor([0.0, 1.0, 9.0]).log_softmax(-1)
    prompt = torch.tensor([[True, False]])
    tokens = Tokens(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, 2), prompt)
    foreign, nearest = nearness(torch.stack([near, far])[None], 0.0, tokens)
    assert foreign.item() < 0.01
    assert nearest.item() == 0


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(-20, 20), st.floats(-5, 5))
def test_the_seeds_odds_and_a_common_score_change_nothing(scores: list[float], odds: float, shift: float) -> None:
    plain = torch.tensor([[scores]], dtype=torch.float64)
    moved = plain + shift
    moved[..., -1] += odds
    one, _ = nearness(plain.log_softmax(-1), 0.0, torch.zeros(1, 3, 2, 2))
    two, _ = nearness(moved.log_softmax(-1), odds, torch.zeros(1, 3, 2, 2))
    assert math.isclose(one.item(), two.item(), abs_tol=1e-5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        (folder / "deep" / str(number)).mkdir(parents=True)
        Image.new("L", (20, 20), 80 * number).save(folder / "deep" / str(number) / "one.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures_without_labels_are_counted(finished: Path, pictures: Path, run_metamoe, capsys) -> None:
    found = metamoe.load(finished / "model").drift(pictures)
    assert found.count == 3 == sum(found.near.values()) + found.none
    assert found.percent == pytest.approx(100 * found.none / 3)
    assert len(found.examples) == found.none
    assert all(probability > 0.5 for _, probability in found.examples)
    assert run_metamoe("model", "drift", str(finished / "model"), "--data", str(pictures), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["near"], said["none"], said["fine"]) == (found.near, found.none, True)
    code = run_metamoe("model", "drift", str(finished / "model"), "--data", str(pictures), "--fail-above", "0")
    assert code == (1 if found.none else 0)


def test_prompts_are_lines_or_questions(model: metamoe.Model, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("Where do fish live?\n\nName a colour.\n")
    by_line = model.drift(lines)
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": q, "choices": ["a", "b"], "answer": 0} for q in ("Where do fish live?", "Name a colour.")]
    questions.write_text("\n".join(map(json.dumps, rows)))
    assert (by_line.count, model.drift(questions).count) == (2, 2)


def test_what_cannot_be_told_is_refused(finished: Path, model: metamoe.Model, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="holds nothing to look at"):
        metamoe.load(finished / "model").drift(tmp_path)
    with pytest.raises(InputFileError, match="cannot be read"):
        model.drift(tmp_path / "none.txt")
    dot = byte_model(tmp_path, "router.rows=dot")
    with pytest.raises(InvalidSettingError, match=r"router.rows = dot: this model's router cannot tell"):
        dot.drift(tmp_path / "prompts.txt")
