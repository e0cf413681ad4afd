"""Decoders of the LLaMA family, in their real classes and tiny configurations."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from metamoe.common.config import Settings
from metamoe.common.data.tasks import TextSamples
from metamoe.common.data.text import Question
from metamoe.common.errors import ModelStructureError
from metamoe.common.model.batch import TextBatch, packed
from metamoe.common.model.generation import Decoding, Request, Sampling, Step
from metamoe.common.model.inputs import Tokens, encode, prompt_tokens
from metamoe.common.model.lora import save_adapter, with_lora
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.model.vectors import batch_features, ffn_inputs
from metamoe.common.presets import changed
from metamoe.simulations.train_seed import tokenizer_for
from tests.conftest import WORDS, random_expert, random_features

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
WIDTH = 32


@pytest.fixture(scope="module", params=CLASSES)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seed:
    """A decoder with random weights on disk: three layers of width 32."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tokenizer_for(WORDS)
    configuration, kind = CLASSES[request.param]
    torch.manual_seed(0)
    model = kind(
        configuration(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.4,
            eos_token_id=3,
            pad_token_id=None,
            bos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_seed.__wrapped__(str(folder))


@pytest.fixture(params=["once", "per-layer"])
def text_settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    return changed(settings, [f"router.decide={request.param}"])


def build(seed: Seed, settings: Settings, experts: int = 3) -> UnifiedModel:
    """A unified model with random experts and rows that send different texts, and tokens, to different ones."""
    deciding = 1 if settings.router.decide == "once" else 3
    routers = [
        RouterWeights(random_features(experts, seed.width, i), np.zeros(experts), settings.router.context)
        for i in range(deciding)
    ]
    weights = [random_expert(seed, settings, k) for k in range(experts)]
    return UnifiedModel(seed, weights, settings.lora, settings.router, routers).eval()


def prompts(lengths: list[int], pads: int = 0, left: bool = False) -> Tokens:
    """Random prompts, always the same for their lengths, with at least so many tokens of padding on one side."""
    rows, real = [], []
    width = max(lengths) + pads
    for number, length in enumerate(lengths):
        ids = torch.randint(4, 12, (length,), generator=torch.Generator().manual_seed(number)).tolist()
        padding = [0] * (width - length)
        rows.append(padding + ids if left else ids + padding)
        mask = [False] * len(padding), [True] * length
        real.append(mask[0] + mask[1] if left else mask[1] + mask[0])
    return prompt_tokens(torch.tensor(rows), torch.tensor(real))


@torch.inference_mode()
def test_the_way_through_is_the_stock_models(decoder: Seed) -> None:
    inputs = prompts([9])
    stock = AutoModelForCausalLM.from_pretrained(decoder.reference, dtype=torch.float32)
    torch.testing.assert_close(
        decoder.model.lm_head(encode(decoder.model, inputs)), stock(inputs.ids).logits, atol=1e-5, rtol=1e-5
    )


WINDOWS = {
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
}


@pytest.mark.parametrize("kind", WINDOWS)
@torch.inference_mode()
def test_a_sliding_window_is_the_stock_models(kind: str, tmp_path: Path, settings: Settings) -> None:
    """In one pass, padded, and in generation beyond the window."""
    configured, architecture = CLASSES[kind]
    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4, "sliding_window": 5}
    architecture(configured(vocab_size=14, **sizes, **heads, **WINDOWS[kind])).save_pretrained(tmp_path)
    tokenizer_for(WORDS).save_pretrained(tmp_path)
    seed, stock = load_seed.__wrapped__(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = prompts([17, 9], pads=2, left=True)
    encoded = seed.model.lm_head(encode(seed.model, inputs))
    for row, length in enumerate((17, 9)):
        expected = stock(inputs.ids[row : row + 1, -length:]).logits[0]
        torch.testing.assert_close(encoded[row, -length:], expected, atol=1e-4, rtol=1e-4)
    # An expert that adds nothing: the unified model goes on as the seed does.
    zero = {name: torch.zeros_like(matrix) for name, matrix in random_expert(seed, settings, 0).items()}
    rows = [RouterWeights(random_features(1, WIDTH), np.zeros(1), 0.5)]
    model = UnifiedModel(
        seed,
        [zero],
        settings.lora,
        changed(settings, ["router.renormalise=true", "router-training.supervision=none"]).router,
        rows,
    )
    requests = [Request(inputs.ids[row, -length:].tolist(), 12) for row, length in enumerate((17, 9))]
    for request, own in zip(requests, steps_of(model.eval(), requests, 2), strict=True):
        ids = torch.tensor([list(request.prompt)])
        made = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert [step.token for step in own] == made[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def test_one_expert_equals_its_stock_peft_adapter(decoder: Seed, text_settings: Settings, tmp_path: Path) -> None:
    expert = random_expert(decoder, text_settings, 1)
    save_adapter(tmp_path, decoder, text_settings.lora, expert)
    base = AutoModelForCausalLM.from_pretrained(decoder.reference, dtype=torch.float32)
    ids = prompts([7]).ids
    before = base(ids).logits
    expected = PeftModel.from_pretrained(base, tmp_path)(ids).logits
    model = build(decoder, text_settings, experts=1)
    alone = UnifiedModel(decoder, [expert], text_settings.lora, text_settings.router, [r.weights() for r in model.routers])
    torch.testing.assert_close(alone.backbone.lm_head(alone(prompts([7]))[0]), expected, atol=1e-4, rtol=1e-4)
    own = with_lora(decoder, text_settings.lora, expert)
    torch.testing.assert_close(own.lm_head(encode(own, prompts([7]))), expected, atol=1e-4, rtol=1e-4)
    assert (before - expected).abs().max() > 0.1


@pytest.mark.parametrize("left", [False, True])
@torch.inference_mode()
def test_padding_on_either_side_and_other_texts_change_nothing(decoder: Seed, text_settings: Settings, left: bool) -> None:
    model, lengths = build(decoder, text_settings), [3, 8, 5]
    inputs = prompts(lengths, pads=4, left=left)
    encoded, decisions = model(inputs)
    for row, length in enumerate(lengths):
        alone = Tokens(
            *(getattr(prompts(lengths[: row + 1]), f)[row : row + 1] for f in ("ids", "positions", "visible", "prompt"))
        )
        alone = Tokens(
            alone.ids[:, :length], alone.positions[:, :length], alone.visible[:, :length, :length], alone.prompt[:, :length]
        )
        expected, own = model(alone)
        real = inputs.prompt[row]
        torch.testing.assert_close(encoded[row, real], expected[0], atol=2e-5, rtol=1e-4)
        for got, wanted in zip(decisions, own, strict=True):
            torch.testing.assert_close(got[row, real], wanted[0], atol=2e-5, rtol=1e-4)
    # Means of routing vectors do not see padding either.
    padded = batch_features(decoder.model, decoder.ffn_paths, inputs)
    plain = batch_features(decoder.model, decoder.ffn_paths, prompts(lengths))
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-4)


def steps_of(
    model: UnifiedModel, requests: list[Request], together: int, ends: frozenset[int] = frozenset()
) -> list[list[Step]]:
    """Every request's steps, so many computed together: the next joins where one leaves."""
    decoding, waiting = Decoding(model, ends), dict(enumerate(requests))
    made: list[list[Step]] = [[] for _ in requests]
    while waiting or len(decoding):
        steps = decoding.step() if len(decoding) else {}
        new = {key: waiting.pop(key) for key in list(waiting)[: together - len(decoding)]}
        steps |= decoding.add(new) if new else {}
        for key, step in steps.items():
            made[key].append(step)
    return made


@torch.inference_mode()
def test_cached_generation_equals_the_full_forward_token_by_token(decoder: Seed, text_settings: Settings) -> None:
    model, prompt = build(decoder, text_settings), prompts([6]).ids[0].tolist()
    (made,) = steps_of(model, [Request(prompt, 7)], 1)
    ids = torch.tensor([prompt + [step.token for step in made]])
    inputs = replace(prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool)), prompt=torch.arange(13)[None] < 6)
    encoded, decisions = model(inputs)
    logits = model.backbone.lm_head(encoded[0])
    assert [step.token for step in made] == logits.argmax(1)[5:12].tolist()
    assert [step.reason for step in made] == [None] * 6 + ["length"]
    assert len({step.token for step in made}) > 1
    for number, step in enumerate(made):
        expected = torch.stack([decision[0, 5 + number] for decision in decisions])
        torch.testing.assert_close(step.routing, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("together", [3, 8])
def test_prompts_computed_together_are_continued_as_each_alone(decoder: Seed, text_settings: Settings, together: int) -> None:
    """Of different lengths, ending at different times, so that others join and padding comes and goes; drawn or not."""
    model, lengths = build(decoder, text_settings), [3, 19, 5, 30, 1, 8, 2, 12]
    texts = prompts(lengths)
    requests = [
        Request(texts.ids[i, :n].tolist(), 1 + 4 * i, Sampling(0.8 * (i % 2), 0.9, seed=i)) for i, n in enumerate(lengths)
    ]
    ends = frozenset({3, 11})
    found, alone = (steps_of(model, requests, n, ends) for n in (together, 1))
    for one, other in zip(found, alone, strict=True):
        assert [(step.token, step.reason) for step in one] == [(step.token, step.reason) for step in other]
        torch.testing.assert_close(one[-1].routing, other[-1].routing, atol=5e-5, rtol=1e-3)
    assert {own[-1].reason for own in found} == {"stop", "length"}
    assert len({len(own) for own in found}) > 3


def test_draws_follow_temperature_top_p_and_seed(decoder: Seed, settings: Settings) -> None:
    model, prompt = build(decoder, settings), prompts([6]).ids[0].tolist()

    def drawn(*sampling: float | int | None) -> list[int | None]:
        (made,) = steps_of(model, [Request(prompt, 12, Sampling(*sampling))], 1)
        return [step.token for step in made]

    greedy = drawn(0.0)
    # So little probability that nothing but the likeliest is left, or so low a temperature.
    assert drawn(1.5, 1e-6, 1) == drawn(1e-4, 1.0, 2) == greedy
    assert drawn(1.5, 1.0, 1) == drawn(1.5, 1.0, 1) != greedy
    assert drawn(1.5, 1.0, 1) != drawn(1.5, 1.0, 2)
    assert len({tuple(drawn(5.0)) for _ in range(3)}) == 3


@torch.inference_mode()
def test_what_comes_later_does_not_route_what_came_before(decoder: Seed, text_settings: Settings) -> None:
    """After the prompt, where it is decided once; anywhere, where every layer decides."""
    model, inputs = build(decoder, text_settings), prompts([9])
    inputs = replace(inputs, prompt=torch.arange(9)[None] < 4)
    other = inputs.ids.clone()
    other[0, 6:] = 15 - other[0, 6:]
    one, two = model(inputs)[0], model(replace(inputs, ids=other))[0]
    torch.testing.assert_close(one[0, :6], two[0, :6], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one[0, 6:], two[0, 6:], atol=1e-2)


@torch.inference_mode()
def test_packed_choices_score_as_each_by_itself(decoder: Seed, text_settings: Settings) -> None:
    model = build(decoder, text_settings)
    rows = [([5, 6, 7, 8], [[9, 4], [10], [5, 5, 11]]), ([8, 4], [[6], [7, 9, 9, 4]])]
    batch = TextBatch(*packed(rows))
    scores = batch.scores(model.backbone, model(batch.inputs)[0])
    assert scores.shape == (2, 3)
    assert scores[1, 2] == -torch.inf
    for row, (prompt, choices) in enumerate(rows):
        for number, choice in enumerate(choices):
            ids = torch.tensor([prompt + choice])
            alone = prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
            alone = replace(alone, prompt=torch.arange(ids.shape[1])[None] < len(prompt))
            logits = model.backbone.lm_head(model(alone)[0])[0].log_softmax(-1)
            predicted = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(choice)[:, None])
            torch.testing.assert_close(scores[row, number], predicted.mean(), atol=2e-5, rtol=1e-4)


def test_the_loss_is_that_of_the_answer_and_the_end_alone(decoder: Seed) -> None:
    samples = TextSamples([Question([5, 6, 7], [[8], [9, 10]], 1)], end=3)
    batch = samples.taught(torch.tensor([0]))
    loss = batch.loss(decoder.model, encode(decoder.model, batch.inputs))
    with torch.inference_mode():
        logits = decoder.model(torch.tensor([[5, 6, 7, 9, 10]])).logits[0].log_softmax(-1)
    torch.testing.assert_close(loss, -(logits[2, 9] + logits[3, 10] + logits[4, 3]) / 3, atol=1e-5, rtol=1e-5)


def test_a_long_answer_weighs_no_more_than_a_short_one(decoder: Seed) -> None:
    samples = TextSamples([Question([5, 6, 7], [[8]], 0), Question([4, 4], [[9, 10, 11, 5]], 0)], end=3)

    def loss(*rows: int) -> torch.Tensor:
        batch = samples.taught(torch.tensor(rows))
        return batch.loss(decoder.model, encode(decoder.model, batch.inputs))

    with torch.inference_mode():
        torch.testing.assert_close(loss(0, 1), (loss(0) + loss(1)) / 2, atol=1e-5, rtol=1e-5)


def test_gradients_reach_rows_lambda_and_experts(decoder: Seed, text_settings: Settings) -> None:
    model = build(decoder, text_settings)
    batch = TextBatch(*packed([([5, 6, 7, 8], [[9, 4]]), ([8, 4, 9], [[6]])]))
    batch.loss(model.backbone, model(batch.inputs)[0]).backward()
    for router in model.routers:
        assert router.rows.grad.abs().max() > 1e-6
        assert router.context.grad.abs() > 1e-7
    for layer in model.layers:
        assert all(matrix.grad.abs().max() > 0 for matrix in (*layer.a.values(), *layer.b.values()))
    assert all(parameter.grad is None for parameter in decoder.model.parameters())


@torch.inference_mode()
def test_at_lambda_one_a_decision_is_one_for_the_whole_text(decoder: Seed, settings: Settings) -> None:
    fixed = changed(settings, ["router.context=1", "router.learn-context=false"])
    learnt = changed(settings, ["router.context=1"])
    inputs = prompts([5, 7])
    (one, (decision,)), (two, (each,)) = build(decoder, fixed)(inputs), build(decoder, learnt)(inputs)
    assert (decision.shape, each.shape) == ((2, 1, 3), (2, 7, 3))
    torch.testing.assert_close(decision.expand(each.shape)[inputs.prompt], each[inputs.prompt], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one[inputs.prompt], two[inputs.prompt], atol=2e-5, rtol=1e-4)


def test_features_are_means_over_the_prompt(decoder: Seed) -> None:
    inputs = replace(prompts([6]), prompt=torch.arange(6)[None] < 4)
    features = batch_features(decoder.model, decoder.ffn_paths[1:2], inputs)
    with torch.inference_mode(), ffn_inputs(decoder.model, decoder.ffn_paths[1:2]) as captured:
        hidden = encode(decoder.model, inputs)
    torch.testing.assert_close(features[0, 0], captured[decoder.ffn_paths[1]][0, :4].mean(0))
    torch.testing.assert_close(features[0, 1], hidden[0, :4].mean(0))


def test_a_model_of_another_structure_says_what_was_found(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(tmp_path)
    tokenizer_for(WORDS).save_pretrained(tmp_path)
    with pytest.raises(ModelStructureError, match=r"gate_proj, up_proj, down_proj in GPT2LMHeadModel; found .*GPT2LMHeadModel"):
        load_seed.__wrapped__(str(tmp_path))
