"""bfloat16 from end to end, on a CPU: products by autocast, and over weights that are held in it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel, LlamaConfig, LlamaForCausalLM

import metamoe
from metamoe.common.compute import Place, place_of
from metamoe.common.config import Data, Settings
from metamoe.common.data.datasets import load_domain
from metamoe.common.data.pixels import pixel_values
from metamoe.common.errors import InvalidSettingError
from metamoe.common.model.artifact import load_model
from metamoe.common.model.batch import Batch, ImageBatch, TextBatch, packed, text_features
from metamoe.common.model.generation import Decoding, Request
from metamoe.common.model.inputs import encode, masked_mean
from metamoe.common.model.lora import expert_of, with_lora
from metamoe.common.model.moe import MoELayer, UnifiedModel
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import load_seed, seed_at
from metamoe.common.model.vectors import batch_features
from metamoe.common.presets import changed, load_settings
from metamoe.simulations.local import run_local
from metamoe.simulations.results import write_results
from metamoe.simulations.train_seed import tokenizer_for
from tests.conftest import WORDS, random_expert, random_features

CPU = torch.device("cpu")
HELD = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tokenizer_for(WORDS)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, bos_token_id=1, eos_token_id=3, **small)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["images", "text"])
def case(request: pytest.FixtureRequest, decoder_folder: Path) -> tuple[str, Batch]:
    """Where a seed is, and a batch for it. Of images the built-in one: random weights large enough to matter make rounding
    large too.
    """
    if request.param == "images":
        seed = load_seed("glyphs")
        return "glyphs", ImageBatch(
            glyphs(4), torch.tensor([0, 1, 2, 1]), text_features(seed, ["A", "DIGIT ONE", "ARROW"], "{}")
        )
    return str(decoder_folder), TextBatch(*packed([([5, 6, 7, 8], [[9, 4], [6]]), ([8, 4, 9], [[6]])]))


def glyphs(count: int) -> torch.Tensor:
    data = load_domain(Data(), "greek", "test").select(range(count))
    return pixel_values(load_seed("glyphs"), data["image"])


def close(coarse: torch.Tensor, exact: torch.Tensor, share: float = 0.1) -> None:
    """Apart by no more than a share of the length: 8 bits of mantissa, through layers whose random weights are large."""
    assert coarse.dtype == exact.dtype == torch.float32
    assert (coarse - exact).norm() <= share * exact.norm()


@pytest.mark.parametrize("weights", HELD)
@pytest.mark.parametrize("grouping", [0, 10**9])
@pytest.mark.parametrize("decide", ["once", "per-layer"])
@pytest.mark.parametrize(("top_k", "renormalise"), [(1, False), (2, True)])
def test_a_forward_pass_in_every_form(
    case: tuple[str, Batch],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    weights: str,
    grouping: int,
    decide: str,
    top_k: int,
    renormalise: bool,
) -> None:
    """Grouped and masked, against the same in float32, where the same experts are chosen."""
    monkeypatch.setattr("metamoe.common.model.moe._GROUPING", grouping)
    reference, batch = case
    settings = changed(
        settings, [f"router.decide={decide}", f"router.top-k={top_k}", f"router.renormalise={str(renormalise).lower()}"]
    )
    outputs = []
    for place in (Place(CPU), Place(CPU, "bfloat16", weights)):
        seed = seed_at(reference, place)
        # Rows of zeros with biases far apart: what is chosen does not hang on the last digits.
        count = 1 if decide == "once" else len(seed.ffn_paths)
        routers = [RouterWeights(np.zeros((3, seed.width)), np.array([0.0, 3.0, 1.0]), 0.4)] * count
        experts = [{n: t / 5 for n, t in random_expert(seed, settings, k).items()} for k in range(3)]
        model = UnifiedModel(seed, experts, settings.lora, settings.router, routers).eval().requires_grad_(False)
        with torch.inference_mode(), place.computing():
            encoded, decisions = model(batch.inputs)
            outputs.append((encoded.float(), batch.scores(model.backbone, encoded)))
        assert {decision.dtype for decision in decisions} == {torch.float32}
    (exact, scores), (coarse, coarse_scores) = outputs
    assert not torch.equal(exact, coarse)
    close(coarse, exact)
    finite = scores > -torch.inf
    close(coarse_scores[finite], scores[finite])


@pytest.mark.parametrize("weights", HELD)
@pytest.mark.parametrize("form", ["_grouped", "_masked", "_gathered"])
def test_one_expert_is_that_expert(
    case: tuple[str, Batch], settings: Settings, monkeypatch: pytest.MonkeyPatch, weights: str, form: str
) -> None:
    monkeypatch.setattr("metamoe.common.model.moe._GROUPING", 0 if form == "_grouped" else 10**9)
    if form == "_gathered":
        settings = changed(settings, ["router.context=1", "router.learn-context=false"])
        monkeypatch.setattr(MoELayer, "_masked", MoELayer._gathered)
    (reference, batch), place = case, Place(CPU, "bfloat16", weights)
    seed = seed_at(reference, place)
    expert = {name: matrix / 5 for name, matrix in random_expert(seed, settings, 1).items()}
    routers = [RouterWeights(np.ones((1, seed.width)), np.zeros(1), settings.router.context)]
    model = UnifiedModel(seed, [expert], settings.lora, settings.router, routers).eval().requires_grad_(False)
    with torch.inference_mode(), place.computing():
        own = with_lora(seed, settings.lora, expert)
        got, wanted, without = model(batch.inputs)[0], encode(own, batch.inputs), encode(seed.model, batch.inputs)
    close(got.float(), wanted.float(), 0.05)
    # Less than what the expert changes, by far.
    assert (got - wanted).norm() < 0.2 * (without - wanted).norm()


@pytest.mark.parametrize("weights", HELD)
def test_what_is_trained_and_its_gradient_are_float32(case: tuple[str, Batch], settings: Settings, weights: str) -> None:
    (reference, batch), place = case, Place(CPU, "bfloat16", weights)
    gradients = []
    for where in (Place(CPU), place):
        seed = seed_at(reference, where)
        expert = with_lora(seed, settings.lora, random_expert(seed, settings, 0))
        trained = [p for n, p in expert.named_parameters() if "lora_" in n]
        for parameter in trained:
            parameter.requires_grad_(True)
        with where.computing():
            loss = batch.loss(expert, encode(expert, batch.inputs))
            loss.backward()
        assert {loss.dtype, *(p.dtype for p in trained), *(p.grad.dtype for p in trained)} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
        assert {matrix.dtype for matrix in expert_of(expert).values()} == {torch.float32}
    exact, coarse = gradients
    assert torch.nn.functional.cosine_similarity(exact, coarse, dim=0) > 0.98


@pytest.mark.parametrize("weights", HELD)
def test_rows_lambda_and_experts_learn(case: tuple[str, Batch], settings: Settings, weights: str) -> None:
    (reference, batch), place = case, Place(CPU, "bfloat16", weights)
    seed = seed_at(reference, place)
    settings = changed(settings, ["router.decide=per-layer"])
    routers = [RouterWeights(random_features(3, seed.width, i), np.zeros(3), 0.4) for i in range(len(seed.ffn_paths))]
    experts = [random_expert(seed, settings, k) for k in range(3)]
    model = UnifiedModel(seed, experts, settings.lora, settings.router, routers)
    with place.computing():
        encoded, decisions = model(batch.inputs)
        (batch.loss(model.backbone, encoded) + sum(decision.mean() for decision in decisions)).backward()
    for router in model.routers:
        assert router.rows.dtype == router.rows.grad.dtype == torch.float32
        assert router.rows.grad.abs().max() > 0
        assert router.context.grad.abs() > 0


def test_generation_step_by_step_is_the_whole_pass(decoder_folder: Path, settings: Settings) -> None:
    place = Place(CPU, "bfloat16", "bfloat16")
    seed = seed_at(str(decoder_folder), place)
    routers = [RouterWeights(random_features(3, seed.width), np.zeros(3), 0.4)]
    experts = [{n: t / 5 for n, t in random_expert(seed, settings, k).items()} for k in range(3)]
    model = UnifiedModel(seed, experts, settings.lora, settings.router, routers).eval().requires_grad_(False)
    with place.computing():
        decoding = Decoding(model, frozenset())
        made = [decoding.add({0: Request([5, 6, 7, 8], 5)})[0]]
        while len(decoding):
            made.append(decoding.step()[0])
    assert len(made) == 5
    assert made[0].routing.dtype == torch.float32
    # What was routed on the prompt holds for all that follows it.
    assert all(torch.equal(step.routing, made[1].routing) for step in made[1:])


def test_means_are_summed_in_float32() -> None:
    # In bfloat16 256 + 1 is 256: neither the count nor the sum of 300 ones would come out.
    z = torch.ones(1, 300, 1, dtype=torch.bfloat16)
    assert masked_mean(z).item() == masked_mean(z, torch.ones(1, 300, dtype=torch.bool)).item() == 1.0
    z[0, 0] = 302.0
    assert masked_mean(z).dtype == torch.float32
    torch.testing.assert_close(masked_mean(z), torch.tensor([[601 / 300]]), atol=1e-6, rtol=0)


def test_statistics_and_text_features_are_float32() -> None:
    for weights in HELD:
        place = Place(CPU, "bfloat16", weights)
        seed, exact = seed_at("glyphs", place), seed_at("glyphs", Place(CPU))
        with place.computing():
            features = batch_features(seed.model, seed.ffn_paths, glyphs(3))
            texts = text_features(seed, WORDS, "{}")
        expected = batch_features(exact.model, seed.ffn_paths, glyphs(3))
        close(features, expected)
        close(texts, text_features(exact, WORDS, "{}"))
        torch.testing.assert_close(texts.norm(dim=1), torch.ones(len(WORDS)))


def test_a_seed_says_the_same_of_itself_however_it_is_held(seed_folder: Path, decoder_folder: Path, tmp_path: Path) -> None:
    for reference in (str(seed_folder), str(decoder_folder)):
        stored = load_seed(reference)
        held = seed_at(reference, Place(CPU, "bfloat16", "bfloat16"))
        assert held.dtype == torch.bfloat16
        assert held.fingerprint == stored.fingerprint
        # Held once, whoever asks; and in float32 the stored one itself.
        assert seed_at(reference, Place(CPU, "bfloat16", "bfloat16")) is held
        assert seed_at(reference, Place(CPU)) is stored
    assert {b.dtype for b in held.model.buffers() if b.is_floating_point()} == {torch.float32}
    # One that is stored in bfloat16 is another seed, as its numbers are; and the same to all, however they hold it.
    LlamaForCausalLM.from_pretrained(decoder_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokenizer_for(WORDS).save_pretrained(tmp_path)
    prints = set()
    for place in (Place(CPU), Place(CPU, "bfloat16", "bfloat16")):
        load_seed.cache_clear()
        half = seed_at(str(tmp_path), place)
        assert half.dtype == (torch.float32 if place.weights == "auto" else torch.bfloat16)
        prints.add(half.fingerprint)
    assert len(prints) == 1
    assert prints != {stored.fingerprint}
    # What a copy in float32 of it says of itself, as it says the same of everything.
    LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).save_pretrained(tmp_path / "again")
    tokenizer_for(WORDS).save_pretrained(tmp_path / "again")
    assert {load_seed(str(tmp_path / "again")).fingerprint} == prints


def test_a_temperature_is_never_rounded(seed_folder: Path) -> None:
    stored = CLIPModel.from_pretrained(seed_folder)
    held = seed_at(str(seed_folder), Place(CPU, "bfloat16", "bfloat16"))
    assert torch.equal(held.model.logit_scale, stored.logit_scale)


def test_where_auto_holds_a_seed_as_it_is_stored() -> None:
    gpu, half = torch.device("cuda:0"), torch.bfloat16
    assert Place(gpu, "bfloat16").dtype_of(half) == half
    for place, stored in [
        (Place(gpu, "float32"), half),
        (Place(CPU, "bfloat16"), half),
        (Place(gpu, "bfloat16"), torch.float32),
        (Place(gpu, "bfloat16"), torch.float16),
        (Place(gpu, "bfloat16", "float32"), half),
    ]:
        assert place.dtype_of(stored) == torch.float32
    assert Place(gpu, "bfloat16", "bfloat16").dtype_of(torch.float32) == half


def test_settings_that_cannot_be_kept_are_refused(small: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettingError, match=r"compute.weights = bfloat16 with compute.precision = float32"):
        changed(small, ["compute.weights=bfloat16"])
    private = ["privacy.expert=dp-sgd", "privacy.vectors=gaussian", "compute.precision=bfloat16"]
    with pytest.raises(InvalidSettingError, match=r"privacy.expert = dp-sgd with compute.precision = bfloat16: gradients"):
        changed(small, private)
    # A card that has no bfloat16, which no machine of ours has.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old Card")
    monkeypatch.setattr("metamoe.common.compute._computes_bfloat16", lambda _: False)
    with pytest.raises(InvalidSettingError, match=r"bfloat16: Old Card \(cuda:0\) does not compute in it; set"):
        place_of(changed(small, ["compute.precision=bfloat16"]).compute, "server")
    with pytest.raises(InvalidSettingError, match=r"'cuda:3' is not here: torch sees 1 GPUs, the last of which is cuda:0"):
        place_of(changed(small, ["compute.client-device=cuda:3"]).compute, "client")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["auto", "bfloat16"])
def test_preset_glyphs_reduced_from_end_to_end(tmp_path: Path, weights: str) -> None:
    reduced = ["data.public-samples=600", "data.private-samples=60", "data.test-samples=40", "proxies.pool=200"]
    reduced += ["proxies.count=30", "expert-training.epochs=1", "router-training.epochs=1", "privacy.min-samples=10"]
    settings = load_settings("glyphs", [*reduced, "compute.precision=bfloat16", f"compute.weights={weights}"])
    run_local(settings, tmp_path)
    results = write_results(settings, tmp_path, lambda _done, _total: None)
    # Far above what names drawn by chance reach: 10, 4 and 3.
    assert results["accuracy"]["metamoe"]["average"] > 25
    delivered = load_model(tmp_path / "clients" / "greek" / "model")
    assert delivered.manifest.model_hash == results["model"]
    # What is stored says nothing of the precision it was computed in: float32 takes it up.
    assert delivered.manifest.seed_fingerprint == load_seed("glyphs").fingerprint
    assert delivered.model.layers[0].a["fc1"].dtype == torch.float32


def questions(folder: Path, seed_model: Path) -> Settings:
    """A small run of two domains of questions, and instructions as the public set, on disk."""
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, 3))

    for name in ("one", "two"):
        rows = [
            {"context": "", "question": text(), "choices": [text(), text()], "answer": int(rng.integers(2))} for _ in range(20)
        ]
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / name / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:8])))
    told = [{"instruction": text(), "input": "", "output": text()} for _ in range(60)]
    (folder / "told").mkdir()
    (folder / "told" / "all.jsonl").write_text("\n".join(map(json.dumps, told)))
    small = [f"seed-model={seed_model}", "clients=2", "proxies.count=6", "proxies.pool=20", "lora.rank=2", "lora.first-layer=1"]
    small += ["expert-training.epochs=1", "router-training.epochs=1", "compute.micro-batch-size=3"]
    data = ["data.source=questions", f"data.folder={folder}", "data.public=told", 'data.domains=["one", "two"]']
    return changed(Settings(), [*data, *small])


@pytest.mark.parametrize("weights", ["auto", "bfloat16"])
def test_questions_from_end_to_end(tmp_path: Path, decoder_folder: Path, weights: str) -> None:
    settings = questions(tmp_path / "data", decoder_folder)
    settings = changed(settings, ["compute.precision=bfloat16", f"compute.weights={weights}"])
    run_local(settings, tmp_path / "run")
    results = write_results(settings, tmp_path / "run", lambda _done, _total: None)
    assert set(results["accuracy"]) == {"zero-shot", "expert:one", "expert:two", "metamoe"}
    model = metamoe.load(tmp_path / "run" / "model", precision="bfloat16")
    assert model.score(tmp_path / "data" / "one" / "test.jsonl").count == 8
    assert isinstance(model.generate("DIGIT ONE", max_tokens=3).text, str)
    assert 0 < model.route("DIGIT ONE").probability <= 1
    # Nothing of it is left behind in whoever asked.
    assert not torch.is_autocast_enabled("cpu")
