"""A unified model as one of transformers' own Mixture-of-Experts architectures: exact, or refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from metamoe.common.compute import ON_CPU
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.files import replaced_folder, write_atomically
from metamoe.common.model.artifact import Loaded, Manifest, UnifiedWeights, load_model, read_weights, seed_of
from metamoe.common.model.card import exported_card
from metamoe.common.model.generation import Decoding, Request
from metamoe.common.model.inputs import Tokens, prompt_tokens
from metamoe.common.model.lora import expert_layers
from metamoe.common.model.seed import Seed
from metamoe.common.model.vectors import ffn_inputs
from metamoe.drift import prompts_in
from metamoe.writing import end_tokens

Kind = Literal["mixtral", "qwen2-moe"]

_SEEDS: dict[Kind, tuple[str, ...]] = {"mixtral": ("llama", "mistral"), "qwen2-moe": ("qwen2", "llama", "mistral")}
# Settings of a decoder that mean the same in all these architectures.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "initializer_range"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout"),
)
_NEW = 16
_STEPS, _DECAY = 100, 1e-4


def export_mixture(folder: Path, out: Path, kind: Kind, data: Path | None = None) -> None:
    """Write a unified model as a folder that transformers loads as Mixtral or Qwen2-MoE, with no code but its own.

    Each expert's FFN is W + (alpha / r) B A, and the gate of every layer its router's rows, divided by the temperature. Layers
    below those with experts are the seed's: dense in Qwen2-MoE, in Mixtral as many copies as there are experts.

    Args:
        folder: of the model.
        out: where; replaced when all is there.
        kind: the architecture.
        data: prompts, see :func:`changed_tokens`: where the model is refused for how it routes, the error says how much would
            change.

    Raises:
        ModelFileError: a file of the model is missing, added or changed.
        SeedMismatchError: the seed model here is not the one it was made from.
        InvalidSettingError: the architecture cannot compute what the model does; names each setting in the way.
        InputFileError: ``data`` holds no prompts.
    """
    manifest, weights = read_weights(folder)
    seed = seed_of(manifest, ON_CPU)
    if seed.model.config.model_type not in _SEEDS[kind]:
        raise InvalidSettingError(
            f"--to {kind} with a seed of type {seed.model.config.model_type}: it holds seeds of type "
            f"{', '.join(_SEEDS[kind])}; --to transformers holds any"
        )
    if found := obstacles(manifest, weights, kind):
        told = "--data FILE says, of prompts, what share of the next tokens would change"
        if data is not None:
            told = f"By {data}, {changed_tokens(load_model(folder, ON_CPU), weights, kind, data)}"
        raise InvalidSettingError(
            f"--to {kind} does not hold this model, and --to transformers does. In the way: {'; '.join(found)}. {told}"
        )
    scale = manifest.router.temperature
    gates = [torch.from_numpy(router.rows).float() / scale for router in weights.routers]
    model = mixture(seed, manifest, weights, gates, kind)
    if (how := getattr(seed.model, "generation_config", None)) is not None:
        model.generation_config = how
    with replaced_folder(out) as new:
        model.save_pretrained(new)
        seed.tokenizer.save_pretrained(new)
        write_atomically(new / "README.md", exported_card(manifest, "AutoModelForCausalLM", own_code=False))


def obstacles(manifest: Manifest, weights: UnifiedWeights, kind: Kind) -> list[str]:
    """The settings by which a model's routing is not that of the architecture, each with what it would take.

    There every layer chooses by softmax(z W^T) of each token's z alone, and Mixtral has the chosen weights sum to one.
    """
    router, found = manifest.router, list[str]()
    if router.decide != "per-layer":
        found.append(f"router.decide = {router.decide} (per-layer: each layer there decides, for each token)")
    contexts = [own.context for own in weights.routers]
    if any(contexts):
        found.append(f"router.context, at {max(contexts):.3g} (0, with learn-context = false: tokens there have no context)")
    if any(own.quadratic is not None for own in weights.routers):
        found.append("router.statistics = shape (mean: scores there are linear)")
    elif spread := max(float(np.ptp(own.biases)) for own in weights.routers):
        found.append(f"router.rows = {router.rows}, with biases that are up to {spread:.3g} apart (dot: gates there have none)")
    if router.temperature != 1 and router.seed_expert:
        found.append(
            f"router.temperature = {router.temperature:g} with seed-expert = true (1, or no seed expert: a temperature among "
            "some of the choices is not linear)"
        )
    if kind == "mixtral" and not router.renormalise and router.top_k < len(manifest.expert_names):
        found.append("router.renormalise = false (true, or --to qwen2-moe)")
    return found


@torch.no_grad()
def mixture(seed: Seed, manifest: Manifest, weights: UnifiedWeights, gates: Sequence[Tensor], kind: Kind) -> PreTrainedModel:
    """The experts, merged into the seed, under these gates.

    Args:
        seed: of a type that the architecture holds, in float32.
        manifest, weights: the unified model's.
        gates: W [K, d] of each layer with experts, lowest first.
        kind: the architecture.

    Raises:
        InvalidSettingError: the seed has a parameter that the architecture does not.
    """
    paths, count, form = expert_layers(seed, manifest.lora), len(manifest.expert_names), seed.form
    below = [i for i, path in enumerate(seed.ffn_paths) if path not in paths]
    state = {name: tensor for name, tensor in seed.model.state_dict().items() if ".mlp." not in name}
    biased = any(name.endswith("q_proj.bias") for name in state)
    with torch.device("meta"):
        model = _empty(seed, manifest, kind, below, biased)
    scale = manifest.lora.alpha / manifest.lora.rank
    for number, path in enumerate(seed.ffn_paths):
        own = {name: seed.model.get_parameter(f"{path}.{name}.weight") for name in form.linears}
        if number in below and kind == "qwen2-moe":
            state |= {f"{path}.{name}.weight": matrix for name, matrix in own.items()}
            continue
        experts = []
        for k in range(count):
            matrices = dict(own)
            if number not in below and k < len(weights.experts):
                for name, matrix in own.items():
                    a, b = (weights.experts[k][f"{path}.{name}.lora_{part}.weight"].float() for part in "AB")
                    matrices[name] = matrix + scale * (b @ a)
            experts.append(matrices)
        state[f"{path}.experts.gate_up_proj"] = torch.stack([torch.cat([e[up] for up in form.ups]) for e in experts])
        state[f"{path}.experts.down_proj"] = torch.stack([e[form.down] for e in experts])
        # Equal weights of equal experts are the seed.
        state[f"{path}.gate.weight"] = torch.zeros(count, seed.width) if number in below else gates[number - len(below)]
    for name, tensor in model.state_dict().items():
        if "shared_expert" in name:
            state[name] = torch.zeros(tensor.shape)
    biases = [f"{path}.{name}.bias" for path in seed.ffn_paths for name in form.linears]
    seeds_own = [name for name in biases if name in seed.model.state_dict()]
    if unheld := seeds_own + sorted(state.keys() - model.state_dict().keys()):
        raise InvalidSettingError(f"--to {kind}: the seed has {unheld[0]}, and {kind} has no such parameter")
    model.load_state_dict(state, assign=True)
    # Frequencies are no parameters, and are not among those.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def _empty(seed: Seed, manifest: Manifest, kind: Kind, below: list[int], biased: bool) -> PreTrainedModel:
    config, experts, router = seed.model.config, len(manifest.expert_names), manifest.router
    values: dict[str, Any] = {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}
    values["num_experts_per_tok"] = router.top_k
    window = getattr(config, "sliding_window", None)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**values, num_local_experts=experts, sliding_window=window))
    types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    own = Qwen2MoeConfig(
        **values,
        num_experts=experts,
        norm_topk_prob=router.renormalise,
        moe_intermediate_size=config.intermediate_size,
        shared_expert_intermediate_size=1,
        mlp_only_layers=below,
        qkv_bias=biased,
        use_sliding_window=window is not None,
        sliding_window=window,
        layer_types=getattr(config, "layer_types", None) or types,
    )
    return Qwen2MoeForCausalLM(own)


def changed_tokens(loaded: Loaded, weights: UnifiedWeights, kind: Kind, data: Path) -> str:
    """How many next tokens would be others, in words, if the model were exported all the same.

    Every second prompt's tokens teach each layer's gate what the router decides for them, min_W KL(pi || softmax(z W^T)); at
    each of up to 16 tokens by which the model goes on from the others, the most likely next token is compared.

    Args:
        loaded, weights: the unified model.
        kind: the architecture.
        data: a file of questions or text (docs/data.md), or ``.txt`` with a prompt a line.

    Raises:
        InputFileError: there are fewer than two prompts, or the model goes on from none.
    """
    parts = [part for _, part in prompts_in(loaded, data)]
    prompts = [ids[own].tolist() for part in parts for ids, own in zip(part.ids, part.prompt, strict=True)]
    if len(prompts) < 2:
        raise InputFileError(f"{data} holds {len(prompts)} prompts; at least 2 are needed, one to fit gates and one to compare")
    texts = [(prompt, _continued(loaded, prompt)) for prompt in prompts]
    gates = _fitted(loaded, texts[::2])
    dense = mixture(loaded.seed, loaded.manifest, weights, gates, kind)
    changed = total = 0
    with torch.inference_mode():
        for prompt, made in texts[1::2]:
            likeliest = dense(torch.tensor([prompt + made])).logits[0, len(prompt) - 1 : -1].argmax(-1)
            changed += int((likeliest != torch.tensor(made)).sum())
            total += len(made)
    if not total:
        raise InputFileError(f"{data}: the model ends each of these prompts at once, so there is no next token to compare")
    return f"{100 * changed / total:.1f}% of {total} next tokens would change, with gates fitted to every second prompt"


def _continued(loaded: Loaded, prompt: list[int]) -> list[int]:
    decoding = Decoding(loaded.model, end_tokens(loaded))
    made, steps = list[int](), decoding.add({0: Request(prompt, _NEW)})
    while steps:
        made += [step.token for step in steps.values() if step.token is not None]
        steps = decoding.step() if len(decoding) else {}
    return made


def _fitted(loaded: Loaded, texts: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """Of each layer with experts, the gate [K, d] that is nearest to the router on these texts."""
    paths = loaded.model.paths
    seen: list[list[Tensor]] = [[] for _ in paths]
    decided: list[list[Tensor]] = [[] for _ in paths]
    for prompt, made in texts:
        ids = torch.tensor([prompt + made])
        inputs = prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool))
        inputs = Tokens(inputs.ids, inputs.positions, inputs.visible, torch.arange(ids.shape[1])[None] < len(prompt))
        with torch.no_grad(), ffn_inputs(loaded.model.backbone, paths) as captured:
            _, decisions = loaded.model(inputs)
        for number, path in enumerate(paths):
            seen[number].append(captured[path][0])
            decision = decisions[min(number, len(decisions) - 1)][0]
            decided[number].append(decision.expand(ids.shape[1], -1))
    return [_gate(torch.cat(z), torch.cat(log_pi)) for z, log_pi in zip(seen, decided, strict=True)]


def _gate(z: Tensor, log_pi: Tensor) -> Tensor:
    rows = torch.zeros(log_pi.shape[1], z.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([rows], max_iter=_STEPS, line_search_fn="strong_wolfe")
    pi = log_pi.exp()

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -(pi * (z @ rows.T).log_softmax(-1)).sum(-1).mean() + _DECAY * rows.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return rows.detach()
