"""The built-in images: glyphs of the fonts that matplotlib ships, and scikit-learn's handwritten digits.

Everything is 32 x 32, grey, dark ink on light ground, named by Unicode, and a pure function of the installed fonts and
a seed; nothing is downloaded. The *public* set holds one image for each font and code point. The private domains come in
pairs that differ within a pair by what is shown and between pairs by how: ``digits`` (real handwriting) and ``numerals``
(printed digits, a little distorted: the same classes), ``greek`` and ``cyrillic`` (letters, strongly distorted), ``arrows``
and ``operators`` (inverted and noisy, resembling nothing public). Of the code points of greek and arrows the public set holds
nothing.
"""

import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter, ImageFont

SIZE = 32
DOMAINS = ("digits", "greek", "arrows", "numerals", "cyrillic", "operators")
SPLITS = ("train", "validation", "test")
PUBLIC_HELD_OUT = 2_000

_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_FONT_SIZE = 26
_GREEK = (*range(0x391, 0x3A2), *range(0x3A3, 0x3AA), *range(0x3B1, 0x3CA))
_ARROWS = tuple(range(0x2190, 0x2200))
_DIGITS = tuple(range(0x30, 0x3A))
_CODE_POINTS = {
    "digits": _DIGITS,
    "greek": _GREEK,
    "arrows": _ARROWS,
    "numerals": _DIGITS,
    "cyrillic": tuple(range(0x410, 0x450)),
    "operators": tuple(range(0x2200, 0x2270)),
}
# Images of each class in train, validation and test.
_PER_CLASS = {
    "greek": (25, 8, 12),
    "arrows": (16, 4, 5),
    "numerals": (100, 20, 50),
    "cyrillic": (25, 8, 12),
    "operators": (16, 4, 5),
}
_DIGITS_PER_SPLIT = (1_097, 200, 500)


def class_names(domain: str) -> list[str]:
    """Unicode names of a domain's classes, in label order: "DIGIT ZERO", ..."""
    return [unicodedata.name(chr(c)) for c in _CODE_POINTS[domain]]


def public(split: str, seed: int = 0) -> Dataset:
    """The public images, ``split`` being "train" or "test" (``PUBLIC_HELD_OUT`` images of classes seen in train).

    Columns: ``image`` (32 x 32, mode L) and ``label`` (index into the Unicode names, sorted).
    """
    images, code_points = _public_glyphs()
    names = sorted({unicodedata.name(chr(c)) for c in code_points})
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[unicodedata.name(chr(c))] for c in code_points])
    # Hold out only what another font shows in train as well: what is measured is forgetting, not guessing of names.
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    left = np.bincount(labels)
    held_out = np.zeros(len(labels), dtype=bool)
    for i in order:
        if left[labels[i]] > 1 and held_out.sum() < PUBLIC_HELD_OUT:
            held_out[i] = True
            left[labels[i]] -= 1
    rows = np.flatnonzero(held_out if split == "test" else ~held_out)
    return _dataset((images[i] for i in rows), labels[rows], names)


def private(domain: str, split: str, seed: int = 0) -> Dataset:
    """The images of one private domain: ``split`` is "train", "validation" or "test". Columns as in :func:`public`."""
    if domain == "digits":
        images, labels = _digits(split, seed)
    else:
        images, labels = _drawn(domain, split, seed)
    return _dataset(images, labels, class_names(domain))


def _dataset(images: Iterator[np.ndarray] | list[np.ndarray], labels: np.ndarray, names: list[str]) -> Dataset:
    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=names)})
    rows = {"image": [PILImage.fromarray(image) for image in images], "label": labels.tolist()}
    return Dataset.from_dict(rows, features=features)


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    # The basic layout: the other one depends on a system library, and images must not.
    return ImageFont.truetype(_font_path(name), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _font_path(name: str) -> Path:
    # Here and below not before it is needed, as most runs find all images in the cache.
    import matplotlib

    return Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")


@cache
def _code_points(font: str) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    return frozenset(c for c in TTFont(_font_path(font)).getBestCmap() if unicodedata.name(chr(c), ""))


def _draw(font: str, code_point: int) -> np.ndarray | None:
    """One glyph, centred, shrunk only if it would not fit; None if it has no ink. uint8 [32, 32]."""
    left, top, right, bottom = _font(font).getbbox(chr(code_point))
    width, height = int(right - left), int(bottom - top)
    if width <= 0 or height <= 0:
        return None
    side = max(width, height, SIZE)
    image = PILImage.new("L", (side, side), 255)
    corner = ((side - width) / 2 - left, (side - height) / 2 - top)
    ImageDraw.Draw(image).text(corner, chr(code_point), fill=0, font=_font(font))
    if side > SIZE:
        image = image.resize((SIZE, SIZE), PILImage.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels if pixels.min() < 128 else None


@cache
def _public_glyphs() -> tuple[list[np.ndarray], list[int]]:
    private_code_points = {*_GREEK, *_ARROWS}
    images, code_points, seen = [], [], set()
    for font in _FONTS:
        for code_point in sorted(_code_points(font) - private_code_points):
            image = _draw(font, code_point)
            # Fonts of one family share many glyphs to the pixel: each is kept once for a code point.
            if image is None or (key := (code_point, image.tobytes())) in seen:
                continue
            seen.add(key)
            images.append(image)
            code_points.append(code_point)
    return images, code_points


def _digits(split: str, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng([seed, 1]).permutation(len(labels))
    rows = np.split(order, np.cumsum(_DIGITS_PER_SPLIT)[:-1])[SPLITS.index(split)]
    grey = 255 - (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    inner = SIZE - 4
    images = []
    for i in rows:
        enlarged = PILImage.fromarray(grey[i]).resize((inner, inner), PILImage.Resampling.BICUBIC)
        images.append(np.pad(np.asarray(enlarged), (SIZE - inner) // 2, constant_values=255))
    return images, labels[rows]


def _drawn(domain: str, split: str, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    code_points = _CODE_POINTS[domain]
    rng = np.random.default_rng([seed, 2 + DOMAINS.index(domain), SPLITS.index(split)])
    count = _PER_CLASS[domain][SPLITS.index(split)]
    images, labels = [], []
    for label, code_point in enumerate(code_points):
        fonts = [f for f in _FONTS if code_point in _code_points(f)]
        for _ in range(count):
            glyph = _draw(fonts[rng.integers(len(fonts))], code_point)
            assert glyph is not None, f"U+{code_point:04X} has no ink"
            if domain in ("greek", "cyrillic"):
                images.append(distort(glyph, rng, rotation=(25, 65), shear=0.3, scale=0.15, shift=3, blur=1, noise=25))
            elif domain == "numerals":
                images.append(distort(glyph, rng, rotation=(-20, 20), shear=0.3, scale=0.15, shift=3, blur=1, noise=10))
            else:
                images.append(255 - distort(glyph, rng, rotation=(-5, 5), shear=0.1, scale=0.1, shift=2, blur=0.3, noise=35))
            labels.append(label)
    order = rng.permutation(len(labels))
    return [images[i] for i in order], np.array(labels)[order]


def corrupted(data: Dataset, corruption: str) -> Dataset:
    """A data set's images, each changed: ``"blur"`` (Gaussian, 1.2 pixels), ``"noise"`` (Gaussian, 50 grey levels) or
    ``"inversion"`` (dark for light).
    """
    rng = np.random.default_rng(0)

    def change(image: PILImage.Image) -> np.ndarray:
        if corruption == "blur":
            return np.asarray(image.filter(ImageFilter.GaussianBlur(1.2)))
        pixels = np.asarray(image, dtype=np.float64)
        changed = pixels + rng.normal(0, 50, pixels.shape) if corruption == "noise" else 255 - pixels
        return changed.clip(0, 255).round().astype(np.uint8)

    return _dataset([change(image) for image in data["image"]], np.asarray(data["label"]), data.features["label"].names)


def distort(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    rotation: tuple[float, float],
    shear: float,
    scale: float,
    shift: float,
    blur: float,
    noise: float,
) -> np.ndarray:
    """A random affine map, blur and additive Gaussian noise on a uint8 image of dark ink on white.

    Args: range of rotation in degrees; largest shear, relative scale, shift and blur radius in pixels (each drawn uniformly up
    to it); standard deviation of the noise in grey levels.
    """
    angle = np.deg2rad(rng.uniform(*rotation))
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, rng.uniform(-shear, shear)], [0, 1]])
    matrix = matrix @ np.diag(1 + rng.uniform(-scale, scale, 2))
    centre = np.full(2, (SIZE - 1) / 2)
    offset = centre - matrix @ (centre + rng.uniform(-shift, shift, 2))
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    warped = PILImage.fromarray(image).transform(
        (SIZE, SIZE), PILImage.Transform.AFFINE, coefficients, PILImage.Resampling.BICUBIC, fillcolor=255
    )
    blurred = warped.filter(ImageFilter.GaussianBlur(rng.uniform(0, blur)))
    noisy = np.asarray(blurred, dtype=np.float64) + rng.normal(0, noise, (SIZE, SIZE))
    return noisy.clip(0, 255).round().astype(np.uint8)
