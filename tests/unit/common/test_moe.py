import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import CLIPModel

from metamoe.common import config
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.model import moe
from metamoe.common.model.inputs import embed, masked_mean
from metamoe.common.model.lora import save_adapter, with_lora
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import Router, RouterWeights, RoutingState
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import ffn_inputs
from metamoe.common.presets import validated
from metamoe.server.unify import train_router
from tests.conftest import WORDS, random_expert, random_features, random_pixels


def build(seed: Seed, settings: Settings, experts: int = 3, same: bool = False) -> UnifiedModel:
    """A unified model with random experts and rows that send different tokens to different ones."""
    deciding = 1 if settings.router.decide == "once" else 2
    routers = [
        RouterWeights(random_features(experts, seed.width, i) * 2, np.zeros(experts), settings.router.context)
        for i in range(deciding)
    ]
    weights = [random_expert(seed, settings, 0 if same else k) for k in range(experts)]
    return UnifiedModel(seed, weights, settings.lora, settings.router, routers).eval()


def variant(settings: Settings, **changes: object) -> Settings:
    values = settings.model_dump()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return validated(values)


def test_one_expert_equals_its_stock_peft_adapter(seed: Seed, settings: Settings, seed_folder, tmp_path) -> None:
    expert = random_expert(seed, settings, 1)
    save_adapter(tmp_path, seed, settings.lora, expert)
    stock = PeftModel.from_pretrained(CLIPModel.from_pretrained(seed_folder, dtype=torch.float32), tmp_path)
    routers = [RouterWeights(np.ones((1, seed.width)), np.zeros(1), 0.5)]
    model = UnifiedModel(seed, [expert], settings.lora, settings.router, routers)
    pixels = random_pixels(5)
    with torch.inference_mode():
        expected = stock.base_model.model.vision_model(pixel_values=pixels).pooler_output
        torch.testing.assert_close(model(pixels)[0], expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(embed(with_lora(seed, settings.lora, expert), pixels), expected, atol=2e-6, rtol=1e-5)
        assert not torch.allclose(embed(seed.model, pixels), expected, atol=1e-2)


@pytest.mark.parametrize(("top_k", "renormalise"), [(1, True), (2, True), (3, False)])
@pytest.mark.parametrize("decide", ["once", "per-layer"])
def test_equal_experts_equal_that_expert(seed: Seed, settings: Settings, top_k: int, renormalise: bool, decide: str) -> None:
    settings = variant(settings, router__top_k=top_k, router__renormalise=renormalise, router__decide=decide)
    model, pixels = build(seed, settings, same=True), random_pixels(4)
    with torch.inference_mode():
        expected = embed(with_lora(seed, settings.lora, random_expert(seed, settings, 0)), pixels)
        torch.testing.assert_close(model(pixels)[0], expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(("top_k", "renormalise"), [(1, False), (1, True), (2, True), (3, False)])
@pytest.mark.parametrize("decide", ["once", "per-layer"])
@pytest.mark.parametrize("context", [0.4, 1.0])
@pytest.mark.parametrize("rows", [3, 4])
def test_tokens_grouped_by_expert_give_what_masking_gives(
    seed: Seed,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
    renormalise: bool,
    decide: str,
    context: float,
    rows: int,
) -> None:
    """Also where a sample's tokens share a decision, and where the last row is the seed's, who has no matrices."""
    changes = {"top_k": top_k, "renormalise": renormalise, "decide": decide, "context": context, "learn_context": False}
    settings = variant(settings, **{f"router__{name}": value for name, value in changes.items()})
    deciding = 1 if decide == "once" else 2
    routers = [RouterWeights(random_features(rows, seed.width, i) * 2, np.zeros(rows), context) for i in range(deciding)]
    experts = [random_expert(seed, settings, k) for k in range(3)]
    model = UnifiedModel(seed, experts, settings.lora, settings.router, routers).eval().requires_grad_(False)
    outputs, grouped = [], []
    monkeypatch.setattr(moe.MoELayer, "_grouped", spied(moe.MoELayer._grouped, grouped))
    for grouping in (0, 10**9):
        monkeypatch.setattr(moe, "_GROUPING", grouping)

        outputs.append(model(random_pixels(6))[0])
    assert len(grouped) == len(model.layers)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    chosen = model.layers[-1].state.route.chosen
    assert len(chosen.unique()) > 1


@pytest.mark.parametrize(("top_k", "renormalise"), [(1, False), (1, True), (2, True), (3, False)])
@pytest.mark.parametrize("seed_expert", [False, True])
def test_matrices_gathered_for_each_sample_give_what_masking_gives(
    seed: Seed, settings: Settings, monkeypatch: pytest.MonkeyPatch, top_k: int, renormalise: bool, seed_expert: bool
) -> None:
    """The form for a GPU, on the CPU."""
    changes = {"top_k": top_k, "renormalise": renormalise, "context": 1.0, "learn_context": False, "seed_expert": seed_expert}
    settings = variant(settings, **{f"router__{name}": value for name, value in changes.items()})
    rows = 3 + seed_expert
    routers = [RouterWeights(random_features(rows, seed.width) * 2, np.zeros(rows), 1.0)]
    experts = [random_expert(seed, settings, k) for k in range(3)]
    model = UnifiedModel(seed, experts, settings.lora, settings.router, routers).eval().requires_grad_(False)
    monkeypatch.setattr(moe, "_GROUPING", 10**9)
    expected = model(random_pixels(6))[0]
    monkeypatch.setattr(moe.MoELayer, "_masked", moe.MoELayer._gathered)
    torch.testing.assert_close(model(random_pixels(6))[0], expected, atol=1e-5, rtol=1e-4)
    chosen = model.layers[-1].state.route.chosen
    assert chosen.shape == (6, 1, top_k)
    # The seed, who has no matrices, is among them where it may be.
    assert len(chosen.unique()) == rows


@pytest.mark.parametrize(("context", "experts", "form"), [(1.0, 3, "_gathered"), (0.4, 1, "_masked"), (0.4, 40, "_grouped")])
def test_on_a_gpu_a_form_is_used_that_need_not_wait_for_it(
    seed: Seed, settings: Settings, monkeypatch: pytest.MonkeyPatch, context: float, experts: int, form: str
) -> None:
    """With the meta device for a GPU, whose tensors nobody can look into; grouping many experts' tokens does."""
    settings = variant(settings, router__context=context, router__learn_context=False)
    elsewhere = replace(seed, model=copy.deepcopy(seed.model).to("meta"))
    routers = [RouterWeights(random_features(experts, seed.width), np.zeros(experts), context)]
    made = [random_expert(seed, settings, k) for k in range(experts)]
    model = UnifiedModel(elsewhere, made, settings.lora, settings.router, routers).eval().requires_grad_(False)
    # The tiny layer is so narrow that masking even a few experts is a large part of it.
    monkeypatch.setattr(moe, "_MASKING", 1.0)
    if form == "_grouped":
        with torch.inference_mode(), pytest.raises((NotImplementedError, RuntimeError)):
            model(random_pixels(2))
        return
    calls: list[str] = []
    for name in ("_gathered", "_masked"):
        kept = getattr(moe.MoELayer, name)
        monkeypatch.setattr(
            moe.MoELayer, name, lambda layer, z, route, n=name, f=kept: (calls.append(n), f(layer, z, route))[1]
        )
    with torch.inference_mode():
        assert model(random_pixels(2))[0].device.type == "meta"
    assert set(calls) == {form}


def spied(function: Callable[..., Tensor], calls: list[object]) -> Callable[..., Tensor]:
    def wrapped(layer: object, z: Tensor, groups: object) -> Tensor:
        calls.append(groups)
        return function(layer, z, groups)

    return wrapped


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_layer_is_the_weighted_sum_of_its_experts_ffns(seed: Seed, settings: Settings, top_k: int) -> None:
    """Eq. 6, evaluated expert by expert and token by token."""
    settings = variant(settings, router__top_k=top_k)
    layer = build(seed, settings).layers[0]
    z = torch.randn(2, 5, seed.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = layer(z)
        probabilities = layer.state.decisions[-1].exp()
        for b, t in itertools.product(range(2), range(5)):
            expected = torch.zeros(seed.width)
            for k in probabilities[b, t].topk(top_k).indices.tolist():
                w1 = layer.base.fc1.weight + layer.scale * layer.b["fc1"][k] @ layer.a["fc1"][k]
                w2 = layer.base.fc2.weight + layer.scale * layer.b["fc2"][k] @ layer.a["fc2"][k]
                ffn = w2 @ layer.base.activation_fn(w1 @ z[b, t] + layer.base.fc1.bias) + layer.base.fc2.bias
                expected += probabilities[b, t, k] * ffn
            torch.testing.assert_close(out[b, t], expected, atol=2e-5, rtol=1e-4)


def test_top_1_of_the_paper_is_not_renormalised(seed: Seed, settings: Settings) -> None:
    paper, released = build(seed, settings), build(seed, variant(settings, router__renormalise=True))
    pixels = random_pixels(3)
    with torch.inference_mode():
        assert not torch.allclose(paper(pixels)[0], released(pixels)[0], atol=1e-3)


def test_probabilities_are_those_of_eq_7() -> None:
    # By hand: z = (1, 0), (0, 1); z_x = (.5, .5); lambda = .5 gives z~ = (.75, .25), (.25, .75).
    router = Router(RouterWeights(np.array([[4.0, 0.0], [0.0, 4.0]]), np.array([0.0, 1.0]), 0.5), config.Router())
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    expected = torch.softmax(torch.tensor([[3.0, 1.0 + 1.0], [1.0, 3.0 + 1.0]]), dim=1)
    torch.testing.assert_close(router(z).exp()[0], expected)


@pytest.mark.parametrize("seed_expert", [True, False])
def test_a_temperature_shares_among_experts_what_the_seed_leaves(seed_expert: bool) -> None:
    # By hand: scores 4, 0 and, of the seed, 1; at temperature 4 the experts' shares are as e^1 to e^0.
    rows = np.array([[4.0], [0.0], [1.0]])[: 2 + seed_expert]
    weights, z = RouterWeights(rows, np.zeros(len(rows)), 1.0), torch.ones(1, 1, 1)
    router = Router(weights, config.Router(temperature=4, seed_expert=seed_expert))
    whole = np.exp(rows[:, 0]) / np.exp(rows[:, 0]).sum()
    shares = np.array([np.e, 1]) / (np.e + 1)
    expected = np.concatenate([whole[:2].sum() * shares, whole[2:]])
    np.testing.assert_allclose(router(z).exp().flatten().tolist(), expected, rtol=1e-6)


@pytest.mark.parametrize("decide", ["once", "per-layer"])
def test_an_image_does_not_depend_on_the_others_in_its_batch(seed: Seed, settings: Settings, decide: str) -> None:
    model, pixels = build(seed, variant(settings, router__decide=decide)), random_pixels(6)
    with torch.inference_mode():
        together = model(pixels)[0]
        alone = torch.cat([model(image[None])[0] for image in pixels])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(pixels.flip(0))[0].flip(0), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(seed: Seed, settings: Settings, left: bool) -> None:
    layer = build(seed, settings).layers[0]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 5, seed.width, generator=generator)
    padding = torch.randn(3, 4, seed.width, generator=generator) * 100
    real, no = torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    padded, mask = (torch.cat(pair[:: 1 if left else -1], 1) for pair in ((padding, z), (no, real)))
    with torch.inference_mode():
        expected = layer(z)
        layer.state = RoutingState(mask)
        out = layer(padded)[:, 4:] if left else layer(padded)[:, :5]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_masked_mean_of_a_hand_computed_case() -> None:
    z = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [100.0], [100.0]], [[5.0], [6.0], [7.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked_mean(z, mask).flatten().tolist() == [2.0, 2.0, 0.0]


def test_a_router_sees_the_ffn_inputs_of_the_layers_below_side_by_side(seed: Seed, settings: Settings) -> None:
    settings = variant(settings, router__evidence="prefix", lora__first_layer=1)
    weights = RouterWeights(random_features(3, 2 * seed.width), np.arange(3.0), 0.4)
    experts = [random_expert(seed, settings, k) for k in range(3)]
    model = UnifiedModel(seed, experts, settings.lora, settings.router, [weights]).eval()
    pixels = random_pixels(3)
    with ffn_inputs(seed.model, seed.ffn_paths) as inputs, torch.inference_mode():
        embed(seed.model, pixels)
        # Neither layer has an expert below it, so the unified model's states are still the seed's.
        both = torch.cat([inputs[path] for path in seed.ffn_paths], dim=-1)
        expected = Router(weights, settings.router)(both)
        torch.testing.assert_close(model(pixels)[1][0], expected, atol=1e-5, rtol=1e-5)
        # A second call does not see the first one's.
        torch.testing.assert_close(model(pixels)[1][0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("top_k", "renormalise"), [(1, False), (1, True), (2, True)])
def test_the_seed_as_an_expert_is_the_seed_where_it_is_chosen(
    seed: Seed, settings: Settings, top_k: int, renormalise: bool
) -> None:
    settings = variant(settings, router__seed_expert=True, router__top_k=top_k, router__renormalise=renormalise)
    # Biases so far apart that the probability of one expert is 1.
    for favourite, expected in ((3, seed.model), (1, with_lora(seed, settings.lora, random_expert(seed, settings, 1)))):
        biases = np.where(np.arange(4) == favourite, 1_000.0, 0.0)
        weights = RouterWeights(np.zeros((4, seed.width)), biases, 0.4)
        experts = [random_expert(seed, settings, k) for k in range(3)]
        model = UnifiedModel(seed, experts, settings.lora, settings.router, [weights]).eval()
        with torch.inference_mode():
            pixels = random_pixels(4)
            torch.testing.assert_close(model(pixels)[0], embed(expected, pixels), atol=5e-6, rtol=1e-5)
            assert model(pixels)[1][0].shape[-1] == 4


def test_held_decision_is_the_lowest_layers(seed: Seed, settings: Settings) -> None:
    model = build(seed, settings)
    _, decisions = model(random_pixels(2))
    assert len(decisions) == len(model.routers) == 1
    per_layer = build(seed, variant(settings, router__decide="per-layer"))
    assert len(per_layer(random_pixels(2))[1]) == len(per_layer.layers) == 2


TRAINED = [
    (decide, rows, top_k, renormalise, supervision)
    for decide in ("once", "per-layer")
    for rows in ("fisher", "dot")
    for top_k, renormalise, supervision in [
        (1, False, "task"),
        (1, False, "provenance"),
        (1, False, "both"),
        (1, True, "provenance"),
        (1, True, "both"),
        (2, True, "task"),
    ]
]


@pytest.mark.parametrize(("decide", "rows", "top_k", "renormalise", "supervision"), TRAINED)
def test_rows_and_lambda_are_trained_wherever_it_is_said(
    seed: Seed, settings: Settings, decide: str, rows: str, top_k: int, renormalise: bool, supervision: str
) -> None:
    settings = variant(
        settings,
        router__decide=decide,
        router__rows=rows,
        router__top_k=top_k,
        router__renormalise=renormalise,
        router_training__supervision=supervision,
        router_training__epochs=1,
    )
    model = build(seed, settings)
    before = [(r.rows.detach().clone(), r.biases.detach().clone(), r.context.item()) for r in model.routers]
    train_router(model, seed, settings, proxies(3), unwatched)
    for router, (old_rows, old_biases, old_context) in zip(model.routers, before, strict=True):
        assert router.rows.grad.abs().max() > 1e-7
        assert router.context.grad.abs() > 1e-7
        assert not torch.equal(router.rows, old_rows)
        assert router.context.item() != old_context
        assert torch.equal(router.biases, old_biases) == (rows == "dot")


def test_renormalised_top_1_is_refused_where_only_the_task_loss_could_train_it() -> None:
    with pytest.raises(Exception, match="renormalise"):
        validated({"router": {"top-k": 1}, "router-training": {"supervision": "task"}})
    # Nothing is lost by it where only the experts are to be trained.
    validated({"router": {"top-k": 1}, "router-training": {"train-router": False, "train-experts": True}})


def test_experts_move_only_if_they_are_to_be_trained(seed: Seed, settings: Settings) -> None:
    for train in (False, True):
        changed = variant(settings, router_training__train_experts=train, router_training__epochs=1)
        model = build(seed, changed)
        before = [matrix.clone() for expert in model.experts() for matrix in expert.values()]
        train_router(model, seed, changed, proxies(3), unwatched)
        after = [matrix for expert in model.experts() for matrix in expert.values()]
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert moved == train


def test_the_seed_itself_is_never_changed(seed: Seed, settings: Settings) -> None:
    pixels = random_pixels(2)
    before = embed(seed.model, pixels)
    fingerprint = Seed(seed.reference, seed.model, seed.tokenizer, seed.processor).fingerprint
    changed = variant(settings, router_training__train_experts=True, router_training__epochs=1)
    train_router(build(seed, changed), seed, changed, proxies(3), unwatched)
    assert torch.equal(embed(seed.model, pixels), before)
    assert Seed(seed.reference, seed.model, seed.tokenizer, seed.processor).fingerprint == fingerprint


def proxies(clients: int) -> list:
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=WORDS)})
    rng = np.random.default_rng(0)

    def images(count: int) -> list[PILImage.Image]:
        return [PILImage.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8)) for _ in range(count)]

    return [Dataset.from_dict({"image": images(4), "label": [0, 1, 2, k]}, features=features) for k in range(clients)]


def test_tokens_of_one_image_decide_apart_below_lambda_one(seed: Seed, settings: Settings) -> None:
    model = build(seed, settings)
    decisions: list[Tensor] = model(random_pixels(1))[1]
    assert decisions[0].std(dim=1).max() > 0
