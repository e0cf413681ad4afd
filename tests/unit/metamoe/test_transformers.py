"""A unified model that transformers loads, in a process that has nothing of this product."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

import metamoe
from metamoe.common.compute import threads
from metamoe.common.config import Settings
from metamoe.common.model.artifact import UnifiedWeights, save_model
from metamoe.common.model.batch import class_logits
from metamoe.common.model.generation import Decoding, Request
from metamoe.common.model.inputs import prompt_tokens
from metamoe.common.model.router import Quadratic, RouterWeights
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.model.vectors import evidence_paths, evidence_width
from metamoe.common.presets import changed
from metamoe.export import export_transformers
from metamoe.predict import class_texts
from tests.conftest import WORDS, random_expert, random_features, random_pixels
from tests.unit.metamoe.conftest import byte_tokenizer

Models = dict[str, metamoe.Model]
Told = dict[str, dict[str, Tensor]]
LENGTHS, NEW = (17, 9, 4), 8
ELSEWHERE = """
import sys
from pathlib import Path

sys.modules["metamoe"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    asked = load_file(folder / "asked.safetensors")
    with torch.inference_mode():
        if "pixels" in asked:
            model = AutoModel.from_pretrained(folder, trust_remote_code=True)
            found = model(asked["ids"], asked["pixels"], asked["real"])
            told = {"scores": found.logits_per_image.contiguous()}
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            told = {"scores": model(asked["ids"], asked["real"]).logits}
            how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            told["made"] = model.generate(asked["ids"], attention_mask=asked["real"], **how)[:, -NEW:].contiguous()
            told["beams"] = model.generate(asked["ids"], attention_mask=asked["real"], num_beams=2, **how).contiguous()
    save_file(told, folder / "told.safetensors")
assert sys.modules["metamoe"] is None
""".replace("NEW", str(NEW))

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 257}
COMMON = ["lora.rank=2", "lora.first-layer=1", "router-training.supervision=none"]
TEXT = {
    "once": ["router.context=0.9"],
    "alone": ["router.context=1", "router.learn-context=false", "router.temperature=2", "router.top-k=1"],
    "paper": [
        *("router.decide=per-layer", "router.evidence=layer", "router.vectors=private", "router.rows=dot"),
        *("router.context=0.4", "router.renormalise=false", "router.seed-expert=false"),
    ],
    "gaussian": ["router.decide=embedding", "router.statistics=shape", "router.shape-rank=3"],
}
IMAGES = {
    "once": ["router.context=0.9"],
    "answers": [
        *("router.decide=embedding", "router.mixing=answers", "router.context=1", "router.learn-context=false"),
    ],
}


def unified(folder: Path, seed: Seed, settings: Settings) -> metamoe.Model:
    """A model of three random experts with random routers of whatever form the settings ask for."""
    width, router = evidence_width(seed, settings.lora, settings.router), settings.router
    count = 3 + router.seed_expert
    biases = np.linspace(0, 1, count) * (router.rows != "dot")
    quadratic = None
    if router.statistics == "shape":
        rng = np.random.default_rng(5)
        quadratic = Quadratic(
            rng.normal(size=width), rng.normal(size=(width, width)), rng.uniform(0.1, 1, (count, width)),
            rng.normal(size=(count, 3, width)) * 0.1,
        )  # fmt: skip
    routers = [
        RouterWeights(random_features(count, width, i) / 8, biases, router.context, quadratic)
        for i in range(len(evidence_paths(seed, settings.lora, router)))
    ]
    names = [] if not seed.is_image_model else WORDS
    weights = UnifiedWeights([random_expert(seed, settings, k) for k in range(3)], routers)
    save_model(folder, seed, settings, ["one", "two", "three"], names, weights)
    return metamoe.load(folder)


def text_seed(folder: Path, model: PreTrainedModel) -> Seed:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return load_seed(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, seed_folder: Path) -> Models:
    """One of each kind."""
    root, found = tmp_path_factory.mktemp("models"), {}
    torch.manual_seed(3)
    llama = text_seed(root / "llama", LlamaForCausalLM(LlamaConfig(initializer_range=0.3, tie_word_embeddings=True, **SIZES)))
    config = MistralConfig(initializer_range=0.3, sliding_window=6, num_key_value_heads=2, **SIZES)
    mistral = text_seed(root / "mistral", MistralForCausalLM(config))
    for name, changes in [*TEXT.items(), ("window", TEXT["once"])]:
        seed = mistral if name == "window" else llama
        settings = changed(Settings(), [f"seed-model={seed.reference}", *COMMON, *changes])
        found[f"text-{name}"] = unified(root / name, seed, settings)
    for name, changes in IMAGES.items():
        settings = changed(Settings(), [f"seed-model={seed_folder}", *COMMON, *changes])
        found[f"images-{name}"] = unified(root / f"images-{name}", load_seed(str(seed_folder)), settings)
    return found


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts, padded on the left."""
    real = torch.stack([torch.arange(max(LENGTHS)) >= max(LENGTHS) - length for length in LENGTHS])
    return torch.randint(1, 250, real.shape, generator=torch.Generator().manual_seed(1)) * real, real


@pytest.fixture(scope="module")
def told(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What each model says in a process that cannot import this product."""
    root = tmp_path_factory.mktemp("exported")
    for name, model in models.items():
        export_transformers(model.folder, root / name)
        if name.startswith("images"):
            texts = model.loaded.seed.tokenizer(WORDS, padding=True, truncation=True, return_tensors="pt")
            asked = {"pixels": random_pixels(5), "ids": texts["input_ids"], "real": texts["attention_mask"]}
        else:
            ids, real = prompts()
            asked = {"ids": ids, "real": real.long()}
        save_file(asked, root / name / "asked.safetensors")
    folders = [str(root / name) for name in models]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *folders], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return {name: load_file(root / name / "told.safetensors") for name in models}


@pytest.mark.parametrize("name", [*(f"text-{name}" for name in (*TEXT, "window"))])
@torch.inference_mode()
def test_a_decoders_logits_are_ours_to_the_bit(
    models: dict[str, metamoe.Model], told: dict[str, dict[str, Tensor]], name: str
) -> None:
    model, (ids, real) = models[name].loaded.model, prompts()
    with threads(1):
        encoded, _ = model(prompt_tokens(ids, real))
        assert torch.equal(told[name]["scores"], model.backbone.lm_head(encoded))
        decoding, made = Decoding(model, frozenset()), {k: list[int]() for k in range(len(LENGTHS))}
        steps = decoding.add({k: Request(row[own].tolist(), NEW) for k, (row, own) in enumerate(zip(ids, real, strict=True))})
        while True:
            for k, step in steps.items():
                made[k].append(step.token)
            if not len(decoding):
                break
            steps = decoding.step()
    assert told[name]["made"].tolist() == list(made.values())
    assert told[name]["beams"].shape == (len(LENGTHS), max(LENGTHS) + NEW)


@pytest.mark.parametrize("name", [f"images-{name}" for name in IMAGES])
@torch.inference_mode()
def test_an_image_models_scores_are_ours_to_the_bit(
    models: dict[str, metamoe.Model], told: dict[str, dict[str, Tensor]], name: str
) -> None:
    loaded = models[name].loaded
    with threads(1):
        texts = class_texts(loaded, WORDS)
        scores, _ = loaded.model.answers(random_pixels(5), partial(class_logits, loaded.model.backbone, texts=texts))
    assert torch.equal(told[name]["scores"], scores)
    assert scores.std() > 0.1
