"""Batches by tokens, and a device that has not memory for them: one that is made up, as a CPU's memory is not a device's."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from metamoe.client.expert import train_expert
from metamoe.common.batching import Fitting, by_tokens
from metamoe.common.compute import Place
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.data.datasets import load_private
from metamoe.common.data.metrics import answered
from metamoe.common.data.pixels import Pixels, all_pixels, batches, pixel_values
from metamoe.common.data.tasks import Parts, TextSamples, class_names, features, samples_of
from metamoe.common.data.text import Question
from metamoe.common.errors import NotEnoughMemoryError
from metamoe.common.model.inputs import encode
from metamoe.common.model.lora import with_lora
from metamoe.common.model.seed import Seed
from metamoe.common.presets import changed
from metamoe.simulations.evaluate import dense
from metamoe.simulations.train_seed import tokenizer_for
from tests.conftest import WORDS, random_expert


class Small:
    """A device with room for so many samples: what computes more of them fails as it would there."""

    def __init__(self, room: int) -> None:
        self.room, self.asked = room, list[int]()

    def __call__(self, rows: Tensor) -> Tensor:
        self.asked.append(len(rows))
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return rows * 2


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 2_000))
def test_every_row_is_in_one_batch_and_none_is_too_large(lengths: list[int], most: int) -> None:
    found = by_tokens(torch.tensor(lengths), most)
    assert sorted(torch.cat(found).tolist()) == list(range(len(lengths)))
    for rows in found:
        longest = max(lengths[row] for row in rows.tolist())
        assert len(rows) == 1 or longest * len(rows) <= most
    ordered = [lengths[row] for row in torch.cat(found).tolist()]
    assert ordered == sorted(lengths, reverse=True)


def test_batches_by_hand() -> None:
    # 9 alone; 4, 3, 3 with padding are 12; 1, 1.
    assert [rows.tolist() for rows in by_tokens(torch.tensor([3, 1, 9, 4, 1, 3]), 12)] == [[2], [3, 0, 5], [1, 4]]


def test_what_does_not_fit_is_halved_is_not_tried_again_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    device, fitting = Small(3), Fitting()
    with caplog.at_level(logging.WARNING, "metamoe"):
        for start in (0, 10):
            pairs = fitting(device, torch.arange(start, start + 10))
            assert torch.equal(torch.cat([rows for rows, _ in pairs]), torch.arange(start, start + 10))
            assert torch.equal(torch.cat([found for _, found in pairs]), 2 * torch.arange(start, start + 10))
    assert device.asked[:3] == [10, 5, 3]
    # Ten, and five, were too many once, and never again.
    assert sum(count > 3 for count in device.asked) == 2
    said = [record.message for record in caplog.records]
    assert said == [
        "the device has not memory for 10 samples at a time; going on with 5",
        "the device has not memory for 5 samples at a time; going on with 3",
    ]


def test_one_sample_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(NotEnoughMemoryError, match=r"one sample does not fit into the device's memory: .*; set "):
        Fitting()(Small(0), torch.arange(2))


@pytest.fixture
def questions() -> TextSamples:
    generator = torch.Generator().manual_seed(0)

    def text(most: int) -> list[int]:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return torch.randint(4, 12, (length,), generator=generator).tolist()

    return TextSamples([Question(text(20), [text(5), text(5)], number % 2) for number in range(23)], end=3)


@pytest.fixture(scope="module")
def decoder() -> Seed:
    tokenizer = tokenizer_for(WORDS)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, **small))
    return Seed("random", model.eval().requires_grad_(False), tokenizer, None)


def test_answers_do_not_depend_on_how_questions_are_put_together(questions: TextSamples, decoder: Seed) -> None:
    expected = answered(dense(decoder.model), questions).chosen
    assert len(expected.unique()) == 2
    for most in (1, 40, 10**6):
        assert torch.equal(answered(dense(decoder.model), replace(questions, tokens_at_once=most)).chosen, expected)
    sizes: list[int] = []

    def scores(batch) -> Tensor:
        sizes.append(batch.inputs.ids.numel())
        if sizes[-1] > 100:
            raise torch.OutOfMemoryError("made up")
        return dense(decoder.model)(batch)

    assert torch.equal(answered(scores, replace(questions, tokens_at_once=10**6)).chosen, expected)
    # Each size that was too large was so once.
    too_large = [size for size in sizes if size > 100]
    assert too_large == sorted(set(too_large), reverse=True)
    assert len(too_large) > 1


def test_features_come_in_the_order_of_the_samples_however_they_are_computed(
    small: Settings, seed: Seed, decoder: Seed
) -> None:
    data = load_private(small, 0, "train")
    text = [{"prompt": " ".join(["A"] * (1 + 7 * row % 5)), "choices": ["A"], "answer": 0} for row in range(11)]
    place = Place(torch.device("cpu"), batch_tokens=20)
    for own, settings, dataset in (
        (seed, small.data, data),
        (decoder, small.data.model_copy(update={"source": "questions"}), text),
    ):
        expected = torch.cat(list(features(own, own.model, own.ffn_paths, settings, dataset)))
        sorted_ = torch.cat(list(features(replace(own, place=place), own.model, own.ffn_paths, settings, dataset)))
        torch.testing.assert_close(sorted_, expected, atol=1e-5, rtol=1e-5)
        assert len(expected) == len(dataset)
        assert expected[:, -1].std(dim=0).max() > 0


@pytest.mark.parametrize("room", [1, 2, 3])
def test_gradients_are_the_batchs_where_only_parts_of_it_fit(
    questions: TextSamples, decoder: Seed, settings: Settings, room: int
) -> None:
    model = with_lora(decoder, settings.lora, random_expert(decoder, settings, 0))
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    sizes: list[int] = []

    def loss(batch, rows: Tensor, share: float) -> Tensor:
        sizes.append(len(rows))
        found = share * batch.loss(model, encode(model, batch.inputs))
        # Only the second part of the first try fails, so that gradients are there already.
        if len(rows) > room and len(sizes) > 1:
            raise torch.OutOfMemoryError("made up")
        return found

    gradients = []
    for parts in (Parts(0), Parts(4)):
        sizes.clear()
        parts.backward(questions, torch.arange(8), optimizer, loss)
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert sizes[:2] == [4, 4]
    assert max(sizes[4:]) <= room
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_an_expert_is_the_same_where_its_batches_did_not_fit(
    seed: Seed, small: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = changed(small, ["expert-training.optimizer=sgd", "expert-training.learning-rate=0.1"])
    data = load_private(settings, 0, "train")

    def trained() -> dict[str, Tensor]:
        return train_expert(seed, settings, 0, [data], class_names(data), unwatched)

    whole = trained()

    def short(model, inputs):
        if len(inputs) > 5:
            raise torch.OutOfMemoryError("made up")
        return encode(model, inputs)

    monkeypatch.setattr("metamoe.client.expert.encode", short)
    for name, matrix in trained().items():
        torch.testing.assert_close(matrix.float(), whole[name].float(), atol=2e-3, rtol=2e-3)
    # Sixteen, eight, four: said twice, for all steps.
    assert [record.args for record in caplog.records if record.name == "metamoe"] == [(16, 8), (8, 4)]


def test_images_are_held_as_bytes_and_are_what_the_processor_makes_of_them(seed: Seed, small: Settings) -> None:
    data = load_private(small, 1, "train").select(range(9))
    held, expected = all_pixels(seed, [data]), pixel_values(seed, data["image"])
    assert isinstance(held, Pixels)
    assert held.values.dtype == torch.uint8
    assert held.values.nbytes * 4 == expected.nbytes
    assert torch.equal(held[:], expected)
    assert torch.equal(held[torch.tensor([3, 1])], expected[[3, 1]])
    assert torch.equal(torch.cat(list(batches(seed, data, 4))), expected)


def test_images_at_a_time_go_by_their_tokens(seed: Seed, small: Settings) -> None:
    data = load_private(small, 1, "train").select(range(9))
    # 16 patches and one token more.
    place = Place(torch.device("cpu"), batch_tokens=17 * 4)
    samples = samples_of(replace(seed, place=place), small.data, [data], class_names(data))
    assert [len(rows) for rows in samples.batches()] == [4, 4, 1]
