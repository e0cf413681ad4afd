"""A unified model as Mixtral or Qwen2-MoE, in a process that has nothing of this product, and what is refused."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import metamoe
from metamoe.common.compute import threads
from metamoe.common.config import Settings
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.model.artifact import read_weights
from metamoe.common.model.generation import Decoding, Request
from metamoe.common.model.inputs import prompt_tokens
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed
from metamoe.mixture import Kind, changed_tokens, export_mixture
from tests.unit.metamoe.test_transformers import COMMON, LENGTHS, NEW, SIZES, prompts, text_seed, unified

ELSEWHERE = """
import sys
from pathlib import Path

sys.modules["metamoe"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    asked = load_file(folder / "asked.safetensors")
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder)
        told = {"scores": model(asked["ids"], asked["real"]).logits}
        how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        told["made"] = model.generate(asked["ids"], attention_mask=asked["real"], **how)[:, -NEW:].contiguous()
    save_file(told, folder / "told.safetensors")
    print(type(model).__name__)
""".replace("NEW", str(NEW))

# The paper's router, but for its context.
EXACT = [
    *("router.decide=per-layer", "router.evidence=layer", "router.vectors=private", "router.rows=dot"),
    *("router.context=0", "router.temperature=1"),
]
CASES: dict[str, tuple[str, Kind, list[str]]] = {
    "mixtral": ("llama", "mixtral", []),
    "mixtral-temperature": ("llama", "mixtral", ["router.seed-expert=false", "router.temperature=3", "lora.first-layer=0"]),
    "mixtral-window": ("mistral", "mixtral", ["router.top-k=1"]),
    "qwen": ("qwen2", "qwen2-moe", []),
    "qwen-paper": ("llama", "qwen2-moe", ["router.renormalise=false", "router.seed-expert=false"]),
    "qwen-window": ("mistral", "qwen2-moe", ["router.renormalise=false"]),
}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, grouped = tmp_path_factory.mktemp("seeds"), SIZES | {"num_key_value_heads": 2, "initializer_range": 0.3}
    longer = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = longer | {"original_max_position_embeddings": 16}
    torch.manual_seed(3)
    found: dict[str, PreTrainedModel] = {
        "llama": LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, rope_parameters=rope, **grouped)),
        "mistral": MistralForCausalLM(MistralConfig(sliding_window=6, head_dim=12, **grouped)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(use_sliding_window=True, sliding_window=6, max_window_layers=1, **grouped)),
        "biased": LlamaForCausalLM(LlamaConfig(mlp_bias=True, **grouped)),
    }
    for name, model in found.items():
        for parameter in (p for n, p in model.named_parameters() if n.endswith("bias")):
            torch.nn.init.normal_(parameter)
        text_seed(root / name, model)
    return {name: root / name for name in found}


Make = Callable[..., metamoe.Model]


@pytest.fixture(scope="module")
def make(seeds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    def made(seed: str, *changes: str) -> metamoe.Model:
        settings = changed(Settings(), [f"seed-model={seeds[seed]}", *COMMON, *changes])
        return unified(tmp_path_factory.mktemp("model"), load_seed(str(seeds[seed])), settings)

    return made


@pytest.fixture(scope="module")
def told(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[metamoe.Model, dict[str, Tensor]]]:
    """By case our model, and what its export says in a process that cannot import this product."""
    root, models = tmp_path_factory.mktemp("exported"), {}
    ids, real = prompts()
    for name, (seed, kind, changes) in CASES.items():
        models[name] = make(seed, *EXACT, *changes)
        export_mixture(models[name].folder, root / name, kind)
        save_file({"ids": ids, "real": real.long()}, root / name / "asked.safetensors")
    folders = [str(root / name) for name in CASES]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *folders], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    classes = {"mixtral": "MixtralForCausalLM", "qwen2-moe": "Qwen2MoeForCausalLM"}
    assert done.stdout.split() == [classes[kind] for _, kind, _ in CASES.values()]
    return {name: (models[name], load_file(root / name / "told.safetensors")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits_are_ours_to_rounding_and_greedy_texts_the_same(
    told: dict[str, tuple[metamoe.Model, dict[str, Tensor]]], name: str
) -> None:
    model, found = told[name]
    ids, real = prompts()
    with threads(1):
        encoded, decisions = model.loaded.model(prompt_tokens(ids, real))
        ours = model.loaded.model.backbone.lm_head(encoded)[real]
        decoding, made = Decoding(model.loaded.model, frozenset()), {k: list[int]() for k in range(len(LENGTHS))}
        steps = decoding.add({k: Request(row[own].tolist(), NEW) for k, (row, own) in enumerate(zip(ids, real, strict=True))})
        while steps:
            for k, step in steps.items():
                made[k].append(step.token or 0)
            steps = decoding.step() if len(decoding) else {}
    # Tokens of one prompt choose different experts, so that a gate that looked at anything else would be found out.
    chosen = decisions[-1].topk(model.manifest.router.top_k).indices.sort(-1).values[real]
    assert len(chosen.unique(dim=0)) > 1
    assert float((found["scores"][real] - ours).abs().max() / ours.abs().max()) < 1e-5
    assert found["made"].tolist() == list(made.values())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mixtral", ["router.context=0.4"], "router.context, at 0.4 (0, with learn-context = false"),
        ("mixtral", ["router.rows=fisher"], "router.rows = fisher, with biases that are up to 1 apart (dot"),
        ("mixtral", ["router.temperature=10"], "router.temperature = 10 with seed-expert = true (1, or"),
        ("mixtral", ["router.renormalise=false"], "router.renormalise = false (true, or --to qwen2-moe)"),
        ("qwen2-moe", ["router.decide=once"], "router.decide = once (per-layer"),
    ],
)
def test_what_the_architecture_has_not_is_refused_by_name(
    make: Make, tmp_path: Path, kind: Kind, changes: list[str], message: str
) -> None:
    model = make("llama", *EXACT, *changes)
    with pytest.raises(InvalidSettingError, match=re.escape(message)) as refused:
        export_mixture(model.folder, tmp_path / "out", kind)
    assert "--to transformers does" in str(refused.value)
    assert str(refused.value).count("; ") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seed", "kind", "message"),
    [
        ("qwen2", "mixtral", "--to mixtral with a seed of type qwen2: it holds seeds of type llama, mistral"),
        ("biased", "mixtral", "the seed has model.layers.0.mlp.gate_proj.bias, and mixtral has no such parameter"),
    ],
)
def test_a_seed_of_another_form_is_refused(make: Make, tmp_path: Path, seed: str, kind: Kind, message: str) -> None:
    with pytest.raises(InvalidSettingError, match=re.escape(message)):
        export_mixture(make(seed, *EXACT).folder, tmp_path / "out", kind)


def test_the_command_refuses_the_default_and_says_how_much_would_change(
    make: Make, run_metamoe: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, file = make("llama", "router.statistics=shape", "router.shape-rank=3"), tmp_path / "prompts.txt"
    file.write_text("\n".join(f"{word} and {word}" for word in ("one", "two", "three", "four", "five", "six")))
    common = ("export", str(model.folder), "--out", str(tmp_path / "out"), "--to")
    assert run_metamoe(*common, "mixtral", "--data", str(file)) == InvalidSettingError.exit_code
    said = " ".join(capsys.readouterr().err.split())
    for name in ("router.decide = once", "router.context, at 1", "router.statistics = shape", "router.temperature = 10"):
        assert name in said
    assert re.search(r"\d+\.\d% of 48 next tokens would change", said)
    file.write_text("one")
    assert run_metamoe(*common, "mixtral", "--data", str(file)) == InputFileError.exit_code
    assert run_metamoe(*common, "transformers", "--data", str(file)) == InvalidSettingError.exit_code
    assert not (tmp_path / "out").exists()


def test_fitted_gates_are_the_router_where_that_is_linear_in_a_token(make: Make, tmp_path: Path) -> None:
    model, file = make("llama", *EXACT), tmp_path / "prompts.txt"
    file.write_text("\n".join(f"{word} and {word}" for word in ("one", "two", "three", "four", "five", "six")))
    said = changed_tokens(model.loaded, read_weights(model.folder)[1], "mixtral", file)
    assert float(said.split("%")[0]) < 5
