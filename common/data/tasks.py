"""What "train" and "score" mean: images against the text features of class names."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import CLIPModel

from common.model.seed import Seed

_BATCH = 256


def pixel_values(seed: Seed, images: Sequence[object]) -> Tensor:
    """PIL images as the seed's input. float32 [B, 3, H, W]."""
    return seed.processor(images=list(images), return_tensors="pt")["pixel_values"]


def batches(seed: Seed, dataset: Dataset, size: int = _BATCH) -> Iterator[Tensor]:
    """A data set's images in order, ``size`` at a time. float32 [<= size, 3, H, W]."""
    for start in range(0, len(dataset), size):
        yield pixel_values(seed, dataset[start : start + size]["image"])


def all_pixels(seed: Seed, dataset: Dataset) -> Tensor:
    """All images of a small data set, decoded once. float32 [N, 3, H, W]."""
    return torch.cat(list(batches(seed, dataset)))


def class_names(dataset: Dataset) -> list[str]:
    return list(dataset.features["label"].names)


def labels_in(dataset: Dataset, space: Sequence[str]) -> Tensor:
    """The data set's labels as indices into a label space. int64 [N]."""
    index = {name: i for i, name in enumerate(space)}
    own = torch.tensor([index[name] for name in class_names(dataset)])
    return own[torch.tensor(dataset["label"], dtype=torch.long)]


@torch.no_grad()
def text_features(seed: Seed, names: Sequence[str], prompt: str) -> Tensor:
    """Unit text features of class names, each put into ``prompt`` at ``{}``. float32 [C, p]."""
    features = []
    for start in range(0, len(names), _BATCH):
        texts = [prompt.replace("{}", name) for name in names[start : start + _BATCH]]
        tokens = seed.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        features.append(
            seed.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        )
    return F.normalize(torch.cat(features), dim=1)


def class_logits(model: CLIPModel, pooled: Tensor, texts: Tensor) -> Tensor:
    """CLIP's scaled cosine similarities of pooled image features [B, d] and unit text features [C, p]. float32 [B, C]."""
    images = F.normalize(model.visual_projection(pooled), dim=1)
    return model.logit_scale.exp() * images @ texts.T


@torch.inference_mode()
def predictions(logits: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Most likely class of every image. int64 [N]."""
    return torch.cat([logits(batch).argmax(1) for batch in pixels.split(_BATCH)])


def accuracy(logits: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor) -> float:
    """Share of images whose most likely class is the right one, in percent."""
    return 100.0 * predictions(logits, pixels).eq(labels).float().mean().item()
