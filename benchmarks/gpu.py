"""What a GPU makes of it: a fixed programme of at most eight minutes at real shapes with random weights, in gpu.json.

Nothing is downloaded. Each line is ours beside the dense seed, or beside what others use, in the same run.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from benchmarks.forward import Row, unified_model
from metamoe.common.compute import Place, optimizer_of
from metamoe.common.config import Settings
from metamoe.common.files import write_json
from metamoe.common.model.batch import TextBatch, packed
from metamoe.common.model.generation import Decoding, Request
from metamoe.common.model.inputs import encode, prompt_tokens
from metamoe.common.model.lora import with_lora
from metamoe.common.model.moe import MoELayer
from metamoe.common.model.seed import Seed
from metamoe.common.model.sizes import predicted_sizes
from metamoe.common.presets import changed

_SECONDS = 420
_FORMS = ("_gathered", "_masked", "_grouped")


@dataclass(frozen=True)
class Shapes:
    """How large everything is: as in the presets, or reduced, to try the programme itself on a CPU."""

    batches: tuple[int, ...]
    repeats: int
    clip: dict[str, int]
    llama: dict[str, int]
    text: tuple[int, int]
    tokens: int


REAL = Shapes(
    batches=(1, 16, 256),
    repeats=10,
    clip={"patch_size": 32},
    llama={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
    },
    text=(8, 384),
    tokens=64,
)
REDUCED = Shapes(
    batches=(1, 2),
    repeats=2,
    clip={"patch_size": 32, "image_size": 64, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 4},
    llama={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 200},
    text=(2, 24),
    tokens=4,
)


def gpu_cost(device: torch.device, shapes: Shapes, file: Path) -> dict[str, Row]:
    """The whole programme on a device; what was measured, with the card's name, goes to a file.

    Lines that would begin after seven minutes are left out, and named in the file.
    """
    begun, rows, left_out = time.perf_counter(), dict[str, Row](), list[str]()
    for name, part in _parts(device, shapes):
        if time.perf_counter() - begun > _SECONDS:
            left_out.append(name)
        else:
            rows |= part()
    about = {
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "none: a dry run on a CPU at reduced shapes",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "seconds": round(time.perf_counter() - begun, 1),
        "left_out": left_out,
        "rows": rows,
    }
    write_json(file, about)
    return rows


def _parts(device: torch.device, shapes: Shapes) -> Iterator[tuple[str, Callable[[], dict[str, Row]]]]:
    clip = _clip(shapes)
    for precision, weights in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        name = f"CLIP-B/32, {precision} over {weights}"
        place = Place(device, precision, weights)  # type: ignore[arg-type]
        for experts in (3, 30):
            for size in shapes.batches if experts == 3 else shapes.batches[-1:]:
                yield (
                    f"{name}, batch {size}, {experts} experts",
                    lambda n=name, p=place, e=experts, b=size: _forwards(n, clip, p, e, b, shapes),
                )
        yield f"{name}: forms", lambda n=name, p=place: _forms(n, clip, p, shapes)
    with TemporaryDirectory() as folder:
        place = Place(device, "bfloat16", "bfloat16")
        llama = _llama(shapes, Path(folder), device)
        yield "LLaMA 3B, forward", lambda: _text_forwards(llama, place, shapes)
        yield "LLaMA 3B, a step", lambda: _step(llama, place, shapes)
        yield "LLaMA 3B, decoding", lambda: _decoding(llama, place, shapes)


def _clip(shapes: Shapes) -> Seed:
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = CLIPModel(CLIPConfig(vision_config=shapes.clip, text_config=text))
    return Seed("random", model.eval().requires_grad_(False), None, None)


def _llama(shapes: Shapes, folder: Path, device: torch.device) -> Seed:
    config = LlamaConfig(**shapes.llama, tie_word_embeddings=True)
    # The prediction of memory reads it there.
    config.save_pretrained(folder)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        # Where they stay: three billion random numbers take a CPU a minute.
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Seed(str(folder), model.eval().requires_grad_(False), None, None)


def _forwards(name: str, clip: Seed, place: Place, experts: int, size: int, shapes: Shapes) -> dict[str, Row]:
    seed = _held(clip, place)
    vision = seed.model.config.vision_config
    pixels = torch.randn(size, 3, vision.image_size, vision.image_size, device=place.device)
    rows = {}
    for top_k in (1, 2):
        ours = unified_model(seed, experts, top_k)
        found = _seconds([lambda m=ours: m(pixels)[0], lambda: encode(seed.model, pixels)], place, shapes)
        rows |= _row(f"{name}, batch {size}, {experts} experts, top-{top_k}", *found)
    return rows


def _forms(name: str, clip: Seed, place: Place, shapes: Shapes) -> dict[str, Row]:
    """Each form of the layer by itself, which is what its rule goes by."""
    seed = _held(clip, place)
    vision, rows = seed.model.config.vision_config, dict[str, Row]()
    pixels = torch.randn(shapes.batches[-1], 3, vision.image_size, vision.image_size, device=place.device)
    kept = MoELayer.forward

    def one(form: str, layer: MoELayer, z: Tensor) -> Tensor:
        if layer.router is not None:
            kept(layer, z)
        route = layer.state.route
        return layer._grouped(z, route.groups(z.shape[1])) if form == "_grouped" else getattr(layer, form)(z, route)

    for experts, top_k in ((3, 1), (30, 2)):
        model = unified_model(seed, experts, top_k)
        for form in _FORMS:
            MoELayer.forward = lambda layer, z, f=form: one(f, layer, z)  # type: ignore[method-assign]
            try:
                found = _seconds([lambda m=model: m(pixels)[0], lambda: encode(seed.model, pixels)], place, shapes)
            finally:
                MoELayer.forward = kept  # type: ignore[method-assign]
            rows |= _row(f"{name}, {experts} experts, top-{top_k}, {form.strip('_')}", *found)
    return rows


def _text_forwards(llama: Seed, place: Place, shapes: Shapes) -> dict[str, Row]:
    seed, rows = _held(llama, place), dict[str, Row]()
    ids = torch.randint(3, seed.model.config.vocab_size, shapes.text)
    inputs = prompt_tokens(ids, torch.ones_like(ids, dtype=torch.bool)).to(place.device)
    for top_k in (1, 2):
        ours = unified_model(seed, 3, top_k)
        found = _seconds([lambda m=ours: m(inputs)[0], lambda: encode(seed.model, inputs)], place, shapes)
        rows |= _row(f"LLaMA 3B, {shapes.text[0]} x {shapes.text[1]}, 3 experts, top-{top_k}", *found)
    return rows


def _step(llama: Seed, place: Place, shapes: Shapes) -> dict[str, Row]:
    """A step of an expert, seconds and peak memory, the latter beside what was predicted of it."""
    seed, (count, length) = _held(llama, place), shapes.text
    answer = length // 4
    changes = [
        f"seed-model={seed.reference}",
        "compute.precision=bfloat16",
        "compute.weights=bfloat16",
        "data.source=questions",
    ]
    changes += [
        f"data.prompt-tokens={length - answer}",
        f"data.answer-tokens={answer}",
        "data.folder=none",
        "lora.first-layer=1",
    ]
    settings = changed(Settings(), [*changes, f"expert-training.batch-size={count}"])
    batch = TextBatch(*packed([([5] * (length - answer), [[7] * (answer + 1)])] * count))
    model = with_lora(seed, settings.lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of("adamw", [{"params": trained, "lr": 1e-4}], 0.0)

    def step() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            loss = batch.loss(model, encode(model, batch.inputs))
            loss.backward()
            optimizer.step()
            return loss.detach()

    cuda = place.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(place.device)
    (seconds,) = _seconds([step], place, shapes)
    peak = torch.cuda.max_memory_allocated(place.device) if cuda else 0
    predicted = predicted_sizes(settings).training
    rate = {"ours": count * length / seconds, "peer": 0.0, "ratio": 0.0, "unit": "tokens/s"}
    memory = {"ours": peak / 2**30, "peer": predicted / 2**30, "ratio": peak / predicted, "unit": "GiB, against predicted"}
    return {f"LLaMA 3B, LoRA step, {count} x {length}": rate, "the same, peak of the card": memory}


def _decoding(llama: Seed, place: Place, shapes: Shapes) -> dict[str, Row]:
    """One prompt, and 32 at once, beside what transformers does of itself with the seed alone."""
    seed, prompt, rows = _held(llama, place), [5] * 32, dict[str, Row]()
    model = unified_model(seed, 3, 1)
    for count in (1, 32):
        ids = torch.tensor([prompt] * count, device=place.device)

        def ours(many: int = count) -> Tensor:
            decoding = Decoding(model, frozenset())
            decoding.add({number: Request(prompt, shapes.tokens) for number in range(many)})
            while len(decoding):
                decoding.step()
            return torch.empty(0)

        def stock(given: Tensor = ids) -> Tensor:
            options = {"max_new_tokens": shapes.tokens, "min_new_tokens": shapes.tokens, "do_sample": False, "pad_token_id": 0}
            return seed.model.generate(given, attention_mask=torch.ones_like(given), **options)

        our, theirs = (count * shapes.tokens / seconds for seconds in _seconds([ours, stock], place, shapes))
        row: Row = {"ours": our, "peer": theirs, "ratio": our / theirs, "unit": "tokens/s"}
        rows[f"LLaMA 3B, decoding, {count} at once"] = row
    return rows


def _held(seed: Seed, place: Place) -> Seed:
    """A seed with random weights where it computes; what was there before it is let go."""
    model: Any = seed.model.to(place.device, place.dtype_of(seed.dtype))
    return Seed(seed.reference, model, None, None, place)


@torch.inference_mode()
def _seconds(runs: list[Callable[[], Tensor]], place: Place, shapes: Shapes) -> list[float]:
    """Medians on the clock, of runs in turn, after one of each that is not counted."""

    def timed(run: Callable[[], Tensor]) -> float:
        begun = time.perf_counter()
        with place.computing():
            run()
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        return time.perf_counter() - begun

    times = [[timed(run) for run in runs] for _ in range(shapes.repeats + 1)][1:]
    return [median(column) for column in zip(*times, strict=True)]


def _row(name: str, ours: float, peer: float) -> dict[str, Row]:
    return {f"{name}, wall": {"ours": 1e3 * ours, "peer": 1e3 * peer, "ratio": ours / peer, "unit": "ms"}}
