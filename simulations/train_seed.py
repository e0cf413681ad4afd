"""Train the built-in seed model: a small CLIP on the public glyphs alone.

Run once; the result is shipped in ``common/model/glyphs_seed``::

    python -m metamoe.simulations.train_seed --out common/model/glyphs_seed
"""

import json
import re
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from metamoe.common.data import glyphs

_BATCH = 256
_EXTRA_NAMES = 1_024
_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 0.05
_WARM_UP_STEPS = 100
_MEAN, _STD = 0.5, 0.5


def tokenizer_for(names: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of ``names`` (upper case, split at spaces and hyphens)."""
    special = ["<pad>", "<start>", "<unknown>", "<end>"]
    words = sorted({word for name in names for word in re.findall(r"\w+|[^\w\s]", name)})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<start>",
        unk_token="<unknown>",
        eos_token="<end>",
        model_max_length=24,
    )


def configuration(vocabulary: int) -> CLIPConfig:
    """1.2 M parameters that see (six layers, width 128, patches of 8), 0.5 M that read."""
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPConfig(
        vision_config=vision | {"image_size": glyphs.SIZE, "patch_size": 8, "projection_dim": 128},
        text_config=text
        | {"vocab_size": vocabulary, "max_position_embeddings": 24, "projection_dim": 128}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3},
        projection_dim=128,
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine maps, contrast, noise and, for one image in five, inversion. float32 [B, 1, H, W] in [0, 1]."""
    n = len(images)

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape, generator=generator) * 2 - 1) * limit

    angle, shear = uniform(0.3), uniform(0.2)
    scale = 1 + uniform(0.15, 2)
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    linear = linear @ (torch.eye(2) + torch.stack([torch.zeros(n), shear, torch.zeros(n), torch.zeros(n)], 1).view(n, 2, 2))
    theta = torch.cat([linear * scale[:, None, :], uniform(0.12, 2)[:, :, None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False) * (1 - torch.rand(n, 1, 1, 1, generator=generator) * 0.4)
    inverted = torch.rand(n, 1, 1, 1, generator=generator) < 0.2
    noise = torch.rand(n, 1, 1, 1, generator=generator) * 0.12
    noise = noise * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5)
    page = torch.where(inverted, ink, 1 - ink)
    return (page + noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def pixels(dataset: glyphs.Dataset) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in dataset["image"]]))[:, None]


def normalised(images: Tensor) -> Tensor:
    return ((images - _MEAN) / _STD).expand(-1, 3, -1, -1)


@torch.inference_mode()
def zero_shot(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, dataset: glyphs.Dataset) -> float:
    """Accuracy in percent among the data set's own class names."""
    model.eval()
    names = dataset.features["label"].names
    texts = F.normalize(model.get_text_features(**tokenizer(names, padding=True, return_tensors="pt")).pooler_output)
    images = normalised(pixels(dataset) / 255)
    seen = torch.cat([model.get_image_features(batch).pooler_output for batch in images.split(_BATCH)])
    return 100 * float((seen @ texts.T).argmax(1).eq(torch.tensor(dataset["label"])).float().mean())


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    epochs: Annotated[int, typer.Option(help="Passes over the public set.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train the seed model, write it with its tokenizer and image processor, and print its zero-shot figures."""
    started = time.monotonic()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, held_out = glyphs.public("train"), glyphs.public("test")
    names = train.features["label"].names
    private_names = [name for domain in glyphs.DOMAINS for name in glyphs.class_names(domain)]
    tokenizer = tokenizer_for(names + private_names)
    model = CLIPModel(configuration(len(tokenizer)))
    tokens = tokenizer(names, padding=True, return_tensors="pt")
    images, labels = pixels(train), torch.tensor(train["label"])
    steps = epochs * (len(labels) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=_WARM_UP_STEPS),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - _WARM_UP_STEPS),
        ],
        [_WARM_UP_STEPS],
    )
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(labels), generator=generator)[: len(labels) // _BATCH * _BATCH]
        losses = []
        for rows in track(order.split(_BATCH), f"epoch {epoch + 1} of {epochs}"):
            others = torch.randint(len(names), (_EXTRA_NAMES,), generator=generator)
            candidates, target = torch.unique(torch.cat([labels[rows], others]), return_inverse=True)
            mask = tokens["attention_mask"][candidates]
            width = int(mask.sum(1).max())
            texts = model.get_text_features(tokens["input_ids"][candidates, :width], mask[:, :width]).pooler_output
            seen = model.get_image_features(normalised(augment(images[rows] / 255, generator))).pooler_output
            logits = model.logit_scale.exp().clamp(max=100) * F.normalize(seen) @ F.normalize(texts).T
            loss = F.cross_entropy(logits, target[: len(rows)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        public = zero_shot(model, tokenizer, held_out)
        typer.echo(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, held-out {public:.1f}%, {time.monotonic() - started:.0f} s")
        if epoch % 4 == 3 or epoch == epochs - 1:
            save(model, tokenizer, out)
    stored = CLIPModel.from_pretrained(out, dtype=torch.float32)
    figures = {"public held-out": zero_shot(stored, tokenizer, held_out)}
    for domain in glyphs.DOMAINS:
        figures[domain] = zero_shot(stored, tokenizer, glyphs.private(domain, "validation"))
    typer.echo(
        json.dumps({name: round(value, 1) for name, value in figures.items()} | {"seconds": round(time.monotonic() - started)})
    )


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in float16, which halves it; it is read back as float32."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    weights = {name: tensor.half() for name, tensor in load_file(out / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(out)
    CLIPImageProcessorPil(
        size={"height": glyphs.SIZE, "width": glyphs.SIZE},
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[_MEAN] * 3,
        image_std=[_STD] * 3,
    ).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
