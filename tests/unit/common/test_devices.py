"""Devices and precision, as far as a machine without a GPU can tell: with torch's meta device a tensor that was left behind on
the CPU is an error, as it is with a GPU.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from metamoe.client.expert import _rate, train_expert
from metamoe.common.compute import device_of, place_of, precision_of
from metamoe.common.config import Settings
from metamoe.common.curve import unwatched
from metamoe.common.data.datasets import load_private
from metamoe.common.data.tasks import TextSamples, class_names, in_parts, samples_of
from metamoe.common.data.text import Question
from metamoe.common.errors import InvalidSettingError
from metamoe.common.model.batch import Batch, ImageBatch, TextBatch, packed
from metamoe.common.model.inputs import encode
from metamoe.common.model.lora import with_lora
from metamoe.common.model.moe import UnifiedModel
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.model.sizes import meta_seed, predicted_sizes, step_bytes
from metamoe.common.presets import changed
from metamoe.simulations.train_seed import tokenizer_for
from tests.conftest import WORDS, random_expert, random_features, random_pixels


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Seed:
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tokenizer_for(WORDS)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.4, **small)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_seed.__wrapped__(str(folder))


@pytest.fixture(params=["images", "text"])
def case(request: pytest.FixtureRequest, seed: Seed, decoder: Seed) -> tuple[Seed, Batch]:
    """A seed and a batch for it, on the CPU."""
    if request.param == "images":
        texts = torch.nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
        return seed, ImageBatch(random_pixels(4), torch.tensor([0, 1, 2, 1]), texts)
    return decoder, TextBatch(*packed([([5, 6, 7, 8], [[9, 4], [6]]), ([8, 4, 9], [[6]])]))


def unified(seed: Seed, settings: Settings) -> UnifiedModel:
    routers = [RouterWeights(random_features(3, seed.width), np.zeros(3), 0.4)]
    return UnifiedModel(seed, [random_expert(seed, settings, k) for k in range(3)], settings.lora, settings.router, routers)


def test_nothing_is_left_behind_on_another_device(case: tuple[Seed, Batch], settings: Settings) -> None:
    seed, batch = case
    elsewhere = replace(seed, model=copy.deepcopy(seed.model).to("meta"))
    model = unified(elsewhere, settings)
    encoded, decisions = model(batch.inputs)
    loss = batch.loss(model.backbone, encoded)
    loss.backward()
    assert {loss.device.type, batch.scores(model.backbone, encoded).device.type, decisions[0].device.type} == {"meta"}
    assert model.routers[0].rows.grad.device.type == "meta"
    expert = with_lora(elsewhere, settings.lora)
    batch.loss(expert, encode(expert, batch.inputs)).backward()


def test_in_bfloat16_the_router_keeps_full_precision(case: tuple[Seed, Batch], settings: Settings) -> None:
    seed, batch = case
    model = unified(seed, settings).eval()
    z = torch.randn(2, 5, seed.width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact, expected = model(batch.inputs)[0], model.routers[0](z)
        with precision_of("bfloat16", torch.device("cpu")):
            coarse, (decision,) = model(batch.inputs)
            assert torch.equal(model.routers[0](z), expected)
            assert (z @ z.transpose(1, 2)).dtype == torch.bfloat16
    assert decision.dtype == torch.float32
    assert not torch.equal(exact, coarse)


def test_gradients_of_parts_add_up_to_the_batchs(case: tuple[Seed, Batch], settings: Settings, small: Settings) -> None:
    seed, _ = case
    if seed.is_image_model:
        data = load_private(small, 0, "train")
        samples = samples_of(seed, small.data, [data], class_names(data))
    else:
        texts = [([5, 6], [[7]]), ([8, 4, 9], [[6, 5, 4]]), ([4], [[9, 9]]), ([7, 7, 7, 7], [[5]]), ([6, 5], [[4, 4, 4, 4]])]
        samples = TextSamples([Question(prompt, choices, 0) for prompt, choices in texts], end=3)
    gradients = []
    for size in (0, 2):
        model = with_lora(seed, settings.lora, random_expert(seed, settings, 0))
        for parameter in (trained := [p for n, p in model.named_parameters() if "lora_" in n]):
            parameter.requires_grad_(True)
        for batch, _, share in in_parts(samples, torch.arange(5), size):
            (share * batch.loss(model, encode(model, batch.inputs))).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)


def test_an_expert_by_sgd_and_in_parts_is_the_same(seed: Seed, small: Settings) -> None:
    data = load_private(small, 0, "train")
    sgd = ["expert-training.optimizer=sgd", "expert-training.schedule=constant", "expert-training.learning-rate=0.1"]
    whole, parts, adam = (
        train_expert(seed, changed(small, changes), 0, [data], class_names(data), unwatched)
        for changes in (sgd, [*sgd, "compute.micro-batch-size=5"], [])
    )
    for name, matrix in whole.items():
        torch.testing.assert_close(parts[name].float(), matrix.float(), atol=2e-3, rtol=2e-3)
    assert any(not torch.equal(matrix, adam[name]) for name, matrix in whole.items())


def test_learning_rates_over_a_run(settings: Settings) -> None:
    training = changed(settings, ["expert-training.warmup-steps=2"]).expert_training
    assert [_rate(training, 6, step) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    constant = training.model_copy(update={"schedule": "constant"})
    assert [_rate(constant, 6, step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_a_device_that_is_not_here_is_named() -> None:
    assert device_of("cpu") == torch.device("cpu")
    with pytest.raises(InvalidSettingError, match="'cuda:7' is not here: torch sees"):
        device_of("cuda:7")


def test_sizes_are_known_before_anything_is_loaded(seed_folder: Path, small: Settings, decoder: Seed) -> None:
    for reference in (str(seed_folder), decoder.reference):
        real, predicted = load_seed.__wrapped__(reference), meta_seed(reference)
        assert predicted.ffn_paths == real.ffn_paths
        assert [(n, p.shape) for n, p in predicted.model.named_parameters()] == [
            (n, p.shape) for n, p in real.model.named_parameters()
        ]
        settings = changed(small, [f"seed-model={reference}", "lora.first-layer=0"])
        sizes = predicted_sizes(settings)
        expert = sum(t.numel() for t in random_expert(real, settings, 0).values())
        assert sizes.parameters == sum(p.numel() for p in real.model.parameters())
        assert sizes.expert_parameters == expert
        assert sizes.weights == 4 * sizes.parameters
        # The expert and the two moments of AdamW; its gradient is among what a step takes.
        assert sizes.training == sizes.weights + 12 * expert + step_bytes(predicted, settings)
        half = predicted_sizes(changed(settings, ["compute.precision=bfloat16", "compute.weights=bfloat16"]))
        assert (half.weights, half.parameters) == (2 * sizes.parameters, sizes.parameters)
        assert half.training < sizes.training


PRECISIONS = [("float32", "auto"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize(("precision", "weights"), PRECISIONS)
@pytest.mark.parametrize("kind", ["images", "text"])
def test_what_a_training_step_takes_is_predicted(
    tmp_path: Path, small: Settings, precision: str, weights: str, kind: str
) -> None:
    """Within 15% of what the CPU's allocator gives out at its peak, while an expert of a seed not too small is trained."""
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "images":
        vision = {"image_size": 64, "patch_size": 8, "projection_dim": 32}
        CLIPModel(CLIPConfig(vision_config=tower | vision, text_config=tower, projection_dim=32)).save_pretrained(tmp_path)
    else:
        LlamaForCausalLM(LlamaConfig(vocab_size=500, **tower)).save_pretrained(tmp_path)
    changes = [f"seed-model={tmp_path}", "lora.rank=8", "lora.first-layer=0", "data.prompt-tokens=40", "data.answer-tokens=8"]
    changes += [f"compute.precision={precision}", f"compute.weights={weights}", "compute.micro-batch-size=8"]
    settings = changed(small, changes)
    place, config = place_of(settings.compute, "client"), AutoConfig.from_pretrained(tmp_path)
    stored = (CLIPModel if kind == "images" else LlamaForCausalLM).from_pretrained(tmp_path)
    held = stored.to(torch.bfloat16 if weights == "bfloat16" else torch.float32).eval().requires_grad_(False)
    seed = Seed(str(tmp_path), held, None, None)
    if kind == "images":
        size = config.vision_config.image_size
        batch: Batch = ImageBatch(torch.randn(8, 3, size, size), torch.arange(8), torch.randn(1_000, 32))
    else:
        batch = TextBatch(*packed([([5] * 40, [[7] * 9])] * 8))
    with place.computing():
        model = with_lora(seed, settings.lora)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
            batch.loss(model, encode(model, batch.inputs)).backward()
    given = sorted((e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    measured = int(np.cumsum([size for _, size in given]).max())
    predicted = step_bytes(meta_seed(str(tmp_path), seed.dtype), settings)
    assert predicted == pytest.approx(measured, rel=0.15)
