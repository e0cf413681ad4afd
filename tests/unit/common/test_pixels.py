"""From odd files to pixels: what people see, and the same in all ways that a picture can take."""

import base64
import io
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pyarrow import parquet

from metamoe.common.config import Data
from metamoe.common.data.decode import look_at, read_picture
from metamoe.common.data.images import image_dataset, load_images
from metamoe.common.data.pictures import find_pictures, pictures_at
from metamoe.common.data.pixels import batches, pixel_values
from metamoe.common.data.survey import survey
from metamoe.common.data.tasks import samples_of
from metamoe.common.errors import DataFormatError, InputFileError, MetaMoEError
from metamoe.common.model.seed import Seed
from metamoe.examine import examine
from metamoe.predict import read_image
from metamoe.serving.app import image_of


def arrow() -> Image.Image:
    """A black arrow up on white, mode L."""
    pixels = np.full((32, 32), 255, dtype=np.uint8)
    for row in range(4, 16):
        pixels[row, 16 - row : 16 + row - 4] = 0
    pixels[16:28, 12:18] = 0
    return Image.fromarray(pixels)


ARROW = arrow()
SEEN = np.asarray(ARROW.convert("RGB"))
CLEAR = np.asarray(ARROW) == 255
STORED = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
"""EXIF orientations, and the one by which a picture has to be turned so that each of them turns it back."""


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[274] = orientation
    return found


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    copy = picture.copy()
    copy.getexif()[274] = STORED[orientation]
    return ImageOps.exif_transpose(copy)


def sixteen(kind: str) -> Image.Image:
    return Image.fromarray((np.asarray(ARROW).astype(np.uint16) * 257).astype(kind))


def adobe(quality: int = 95) -> bytes:
    stream = io.BytesIO()
    ARROW.convert("RGB").convert("CMYK").save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def without_adobe() -> bytes:
    """A CMYK JPEG as programs other than Adobe's write it: no marker, and colours as they are."""
    stream = io.BytesIO()
    Image.merge("CMYK", [ImageOps.invert(band) for band in ARROW.convert("RGB").convert("CMYK").split()]).save(stream, "JPEG")
    content = stream.getvalue()
    at = content.index(b"\xff\xee")
    return content[:at] + content[at + 2 + struct.unpack(">H", content[at + 2 : at + 4])[0] :]


def transparent(mode: str) -> Image.Image:
    """Black everywhere, and clear where the arrow is not."""
    alpha = Image.fromarray(np.where(CLEAR, 0, 255).astype(np.uint8))
    picture = Image.new(mode, (32, 32))
    picture.putalpha(alpha)
    return picture


def clear_palette(path: Path) -> None:
    picture = Image.fromarray(CLEAR.astype(np.uint8), "P")
    picture.putpalette([0, 0, 0, 0, 0, 0])
    picture.save(path, transparency=1)


def clear_number(path: Path, depth: int) -> None:
    """Grey whose number 7 is clear."""
    values = np.where(CLEAR, 7, 0).astype(np.uint8 if depth == 8 else np.uint16)
    Image.fromarray(values).save(path, transparency=7)


def tiff(path: Path, values: np.ndarray, **tags: int) -> None:
    Image.fromarray(values).save(path, tiffinfo={int(name[1:]): value for name, value in tags.items()})


def twelve(path: Path) -> None:
    """A TIFF of 12 bits, two values in three bytes, which Pillow reads and does not write."""
    pairs = (np.asarray(ARROW).astype(int) * 4095 // 255).reshape(-1, 2)
    strip = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pairs)
    tags = {256: 32, 257: 32, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 32, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4))


GREY = np.asarray(ARROW)
ODD: dict[str, Callable[[Path], object]] = {
    "plain.png": lambda p: ARROW.save(p),
    "bits.png": lambda p: ARROW.convert("1").save(p),
    "rgb.bmp": lambda p: ARROW.convert("RGB").save(p),
    "rgba.png": lambda p: transparent("RGB").save(p),
    "la.png": lambda p: transparent("L").save(p),
    "opaque.png": lambda p: ARROW.convert("RGBA").save(p),
    "rgba.webp": lambda p: transparent("RGB").save(p, lossless=True),
    "rgba.tiff": lambda p: transparent("RGB").save(p),
    "palette.png": lambda p: ARROW.convert("P").save(p),
    "clear-palette.png": clear_palette,
    "clear-grey.png": lambda p: clear_number(p, 8),
    "clear-16.png": lambda p: clear_number(p, 16),
    "16.png": lambda p: sixteen("<u2").save(p),
    "16-little.tiff": lambda p: sixteen("<u2").save(p),
    "16-big.tiff": lambda p: sixteen(">u2").save(p),
    "16-rgb.ppm": lambda p: p.write_bytes(b"P6 32 32 65535 " + (SEEN.astype(">u2") * 257).tobytes()),
    "16.pgm": lambda p: p.write_bytes(b"P5 32 32 65535 " + (GREY.astype(">u2") * 257).tobytes()),
    "negative-16.tiff": lambda p: tiff(p, (65535 - GREY.astype(np.uint16) * 257), t262=0),
    "12.tiff": twelve,
    "float.tiff": lambda p: tiff(p, GREY.astype(np.float32) / 255),
    "cmyk.tiff": lambda p: ARROW.convert("RGB").convert("CMYK").save(p),
    "adobe.jpg": lambda p: p.write_bytes(adobe()),
    "cmyk.jpg": lambda p: p.write_bytes(without_adobe()),
    "pages.tiff": lambda p: ARROW.save(p, save_all=True, append_images=[Image.new("L", (32, 32))]),
    "moving.gif": lambda p: ARROW.save(p, save_all=True, append_images=[Image.new("L", (32, 32))]),
    "moving.png": lambda p: ARROW.save(p, save_all=True, append_images=[Image.new("L", (32, 32))]),
    "moving.webp": lambda p: ARROW.save(p, save_all=True, append_images=[Image.new("L", (32, 32))], lossless=True),
    "turned.png": lambda p: turned(ARROW, 6).save(p, exif=exif(6)),
    "turned.webp": lambda p: turned(ARROW, 8).convert("RGB").save(p, exif=exif(8), lossless=True),
    "turned.tiff": lambda p: turned(ARROW, 3).save(p, exif=exif(3)),
    **{f"{k}.jpg": lambda p, k=k: turned(ARROW, k).save(p, quality=95, exif=exif(k)) for k in STORED},
    "turned-clear.png": lambda p: turned(transparent("RGB"), 5).save(p, exif=exif(5)),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose only class is made of odd files."""
    folder = tmp_path_factory.mktemp("odd")
    for part in ("train", "test"):
        (folder / "arrows" / part / "UP").mkdir(parents=True)
        for name, write in ODD.items():
            write(folder / "arrows" / part / "UP" / name)
    return folder


@pytest.mark.parametrize("name", ODD)
def test_every_odd_file_shows_what_people_see(odd: Path, name: str) -> None:
    file = odd / "arrows" / "train" / "UP" / name
    picture = read_picture(file, "white")
    # JPEG loses something at edges, and GIF's reader nothing.
    most = 40 if name.endswith(".jpg") else 0
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture).astype(int) - SEEN).max() <= most


def test_all_ways_give_the_same_pixels(odd: Path, seed: Seed) -> None:
    data = Data(source="images", folder=str(odd), domains=("arrows",), public="arrows")
    files = sorted((odd / "arrows" / "test" / "UP").iterdir())
    assert len(files) >= 25
    asked = torch.cat([pixel_values(seed, [read_image(file, "white")]) for file in files])
    opened = torch.cat([pixel_values(seed, [read_image(Image.open(file), "white")]) for file in files])
    test = load_images(data, "arrows", "test", "")
    at = pictures_at(odd / "arrows" / "test", data)
    evaluated = samples_of(seed, data, [image_dataset(at.parts["test"], at.names, "white")], at.names)
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}, "label": "UP"} for file in files]
    (odd / "packed").mkdir(exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), odd / "packed" / "train.parquet")
    packed = find_pictures(odd / "packed", data)
    sent = [base64.b64encode(file.read_bytes()).decode() for file in files]
    ways = {
        "serve": torch.cat([pixel_values(seed, [image_of(n, text, "white")]) for n, text in enumerate(sent)]),
        "an image in Python": opened,
        "train": samples_of(seed, data, [test], ["UP"]).taught(torch.arange(len(files))).inputs,
        "embed": torch.cat(list(batches(seed, test))),
        "embed by workers": torch.cat(list(batches(seed, test, workers=2))),
        "evaluate": evaluated.asked(torch.arange(len(files))).inputs,
        "a table with images": torch.cat(list(batches(seed, image_dataset(packed.parts["train"], packed.names, "white")))),
    }
    for way, pixels in ways.items():
        assert torch.equal(pixels, asked), way


def test_a_background_is_seen_through_what_is_transparent(tmp_path: Path) -> None:
    transparent("RGB").save(tmp_path / "a.png")
    assert np.asarray(read_picture(tmp_path / "a.png", "black")).max() == 0
    green = np.asarray(read_picture(tmp_path / "a.png", "#00ff00"))
    assert green[0, 0].tolist() == [0, 255, 0]
    assert green[20, 15].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, 255.0]], dtype=np.float32), "values from 0 to 255, and what is black"),
        (np.array([[-1.0, 1.0]], dtype=np.float32), "values from -1 to 1"),
        (np.array([[np.nan, 1.0]], dtype=np.float32), "floating-point values from nan"),
        (np.array([[0, 70_000]], dtype=np.int32), "32 bits, or signed ones, whose range cannot be known"),
    ],
)
def test_a_range_that_cannot_be_known_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(InputFileError, match=rf"a\.tiff cannot be read as an image: it has .*{message}"):
        read_picture(tmp_path / "a.tiff", "white")


def test_a_picture_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "a.tiff", "a.webp", "a.bmp"):
        noise.save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputFileError, match=rf"{name} cannot be read"):
            read_picture(tmp_path / name, "white")


def test_what_is_unusual_is_said(odd: Path, tmp_path: Path) -> None:
    def said(name: str) -> list[str]:
        return look_at(odd / "arrows" / "train" / "UP" / name, "white").unusual

    assert said("plain.png") == said("opaque.png") == said("rgb.bmp") == []
    assert said("rgba.png") == ["transparent in places"]
    assert said("6.jpg") == said("turned.tiff") == ["turned as EXIF says"]
    assert said("16.png") == said("16-big.tiff") == ["with 16 bits"]
    assert said("float.tiff") == ["with floating-point values"]
    assert said("adobe.jpg") == ["in CMYK"]
    assert said("pages.tiff") == ["of several pages or frames, the first of which is used"]
    assert said("clear-palette.png") == ["with a palette", "transparent in places"]
    # Twelve bits in sixteen, of which only the lowest are used: as dark as it is for a model.
    Image.fromarray(np.asarray(ARROW).astype(np.uint16) * 3).save(tmp_path / "dark.tiff")
    assert look_at(tmp_path / "dark.tiff", "white").unusual == ["with 16 bits", "of one colour, or nearly"]


@pytest.fixture(scope="module")
def starts(odd: Path) -> list[bytes]:
    return [(odd / "arrows" / "train" / "UP" / name).read_bytes() for name in ODD]


def check_damaged(folder: Path, content: bytes) -> None:
    file = folder / "a.png"
    file.write_bytes(content)
    with warnings.catch_warnings(action="ignore"):
        try:
            found = read_picture(file, "white")
        except InputFileError:
            with pytest.raises(InputFileError, match=r"a\.png cannot be read"):
                look_at(file, "white")
        else:
            assert found.mode == "RGB"
            assert len(look_at(file, "white").digest) == 64


changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8)


def damaged(start: bytes, where: list[tuple[float, int]], kept: float) -> bytes:
    content = bytearray(start)
    for place, value in where:
        content[int(place * (len(content) - 1))] = value
    return bytes(content[: int(kept * len(content))])


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, len(ODD) - 1), where=changes, kept=st.sampled_from([0.3, 0.7, 1.0]))
def test_any_damage_is_a_picture_or_refused(
    starts: list[bytes], tmp_path: Path, number: int, where: list[tuple[float, int]], kept: float
) -> None:
    check_damaged(tmp_path, damaged(starts[number], where, kept))


@pytest.mark.slow
@hypothesis_settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, len(ODD) - 1), where=changes, kept=st.floats(0, 1), noise=st.binary(max_size=200))
def test_two_thousand_files_are_pictures_or_refused(
    starts: list[bytes], tmp_path: Path, number: int, where: list[tuple[float, int]], kept: float, noise: bytes
) -> None:
    check_damaged(tmp_path, damaged(starts[number], where, kept))
    check_damaged(tmp_path, noise)


def picture(folder: Path, name: str, value: int = 0) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)
    return path


def test_class_folders_by_their_rules(tmp_path: Path) -> None:
    # Café, once as one letter and once with an accent by itself.
    picture(tmp_path / "train", "Cafe\u0301/1.png", 10)
    picture(tmp_path / "train", "dog/2023/deep/2.PNG", 20)
    picture(tmp_path / "train", "dog/3.png", 10)
    picture(tmp_path / "val", "Caf\u00e9/4.png", 10)
    picture(tmp_path / "train", ".hidden/5.png")
    picture(tmp_path / "train", "__MACOSX/dog/6.png")
    picture(tmp_path / "train", "dog/._3.png")
    picture(tmp_path / "train", "loose.png")
    for name in ("dog/Thumbs.db", "dog/.DS_Store", "dog/notes.txt", "dog/phone.HEIC"):
        (tmp_path / "train" / name).write_bytes(b"x")
    data = Data(source="images", folder=str(tmp_path))
    found = find_pictures(tmp_path, data)
    assert found.names == ["Caf\u00e9", "dog"]
    assert [(Path(str(file)).name, label) for file, label in found.parts["train"]] == [("1.png", 0), ("2.PNG", 1), ("3.png", 1)]
    assert [label for _, label in found.parts["validation"]] == [0]
    ignored = {kind: sorted(file.name for file in files) for kind, files in found.ignored.items()}
    assert ignored == {
        "of the system": [".DS_Store", "._3.png", "Thumbs.db"],
        "not pictures that can be read (.txt)": ["notes.txt"],
        "not pictures that can be read (.heic)": ["phone.HEIC"],
        "in no folder of a class": ["loose.png"],
    }
    looked = survey(found, data)
    assert looked.counts == {"train": {"Caf\u00e9": 1, "dog": 2}, "validation": {"Caf\u00e9": 1, "dog": 0}}
    assert [Path(text).name for text in looked.unusual["the same picture in two classes"]] == ["3.png"]
    assert [Path(text).name for text in looked.unusual["the same picture in train and validation"]] == ["4.png"]
    assert len(looked.unusual["ignored, of the system"]) == 3


def test_folders_of_classes_alone_are_divided_by_fractions(tmp_path: Path) -> None:
    for number in range(20):
        picture(tmp_path / "pets", f"{'cat' if number % 2 else 'dog'}/{number}.png", 10 * number)
    data = Data(source="images", folder=str(tmp_path), domains=("pets",))
    sizes = {split: len(load_images(data, "pets", split, "")) for split in ("train", "validation", "test")}
    # A fifth of 20 for tests, a tenth of the rest for validation.
    assert sizes == {"train": 14, "validation": 2, "test": 4}
    assert load_images(data, "pets", "train", "").features["label"].names == ["cat", "dog"]
    assert examine(tmp_path / "pets", Data()).survey.counts == {"train": {"cat": 10, "dog": 10}}
    # A single folder may be anything.
    picture(tmp_path / "one", "pictures/1.png")
    with pytest.raises(InputFileError, match="has no folder for a class"):
        find_pictures(tmp_path / "one", data)
    picture(tmp_path / "flat", "1.png")
    with pytest.raises(DataFormatError, match=r"has 1 pictures in no folder of a class; put them into folders such as"):
        examine(tmp_path / "flat", Data())


@hypothesis_settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(kinds=st.lists(st.sampled_from(["good", "damaged", "no picture", "of the system"]), min_size=1, max_size=8))
def test_every_file_of_a_folder_is_used_or_named(tmp_path_factory: pytest.TempPathFactory, kinds: list[str]) -> None:
    folder = tmp_path_factory.mktemp("folder")
    whole = picture(folder, "train/cat/whole.png").read_bytes()
    names = {"good": "png", "damaged": "png", "no picture": "txt", "of the system": "db"}
    for number, kind in enumerate(kinds):
        name = "Thumbs.db" if kind == "of the system" else f"{number}.{names[kind]}"
        (folder / "train" / f"class {number}").mkdir()
        (folder / "train" / f"class {number}" / name).write_bytes(whole if kind == "good" else whole[:40])
    looked = survey(find_pictures(folder, Data()), Data())
    assert sum(looked.counts["train"].values()) == 1 + kinds.count("good")
    assert len(looked.unreadable) == len(looked.wrong) == kinds.count("damaged")
    ignored = sum(len(files) for what, files in looked.unusual.items() if what.startswith("ignored"))
    assert ignored == kinds.count("no picture") + kinds.count("of the system")


def test_folders_that_differ_in_case_or_form_alone_are_refused(tmp_path: Path) -> None:
    for first, second in (("Dog", "dog"), ("Cafe\u0301", "Caf\u00e9")):
        folder = tmp_path / first
        picture(folder, f"train/{first}/1.png")
        picture(folder, f"train/{second}/1.png")
        with pytest.raises(DataFormatError, match="which are one class to some systems"):
            find_pictures(folder, Data())


def test_tables_are_as_good_as_folders(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path, f"scans/{number}.png", 50 * number)
    rows = [("scans/0.png", "cat"), ("scans/1.png", "dog"), ("scans/2.png", "cat")]
    (tmp_path / "train.csv").write_text("\ufeffpath;label\r\n" + "".join(f"{path};{label}\r\n" for path, label in rows))
    (tmp_path / "dev.csv").write_text("path,label\nscans\\3.png,dog\n")
    found = find_pictures(tmp_path, Data())
    assert found.names == ["cat", "dog"]
    assert [(Path(str(file)).name, label) for file, label in found.parts["train"]] == [("0.png", 0), ("1.png", 1), ("2.png", 0)]
    assert [(Path(str(file)).name, label) for file, label in found.parts["validation"]] == [("3.png", 1)]


def test_one_table_may_say_which_row_is_of_which_part_and_name_its_columns(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path, f"{number}.png", 50 * number)
    (tmp_path / "all.csv").write_text("scan,organ,label,split\n0.png,heart,x,train\n1.png,lung,y,train\n2.png,lung,z,val\n")
    found = find_pictures(tmp_path, Data(image_column="scan", label_column="organ"))
    assert found.names == ["heart", "lung"]
    assert {part: [label for _, label in rows] for part, rows in found.parts.items()} == {"train": [0, 1], "validation": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,label\n0.png,x\n", r"line 2 has the columns \['a', 'label'\]; wanted is one of \['image'.*data.image-column"),
        ("path,b\n0.png,x\n", "data.label-column"),
        ("path,label\n9.png,x\n", r"9\.png is not there"),
        ("path,label\n../0.png,x\n", "has to be a path within"),
        ("path,label\n/etc/hostname,x\n", "has to be a path within"),
        ("path,label\n0.png,\n", "the label '' is neither"),
        ("path,label\n0.png\n", "line 2 has 1 cells for the 2 columns"),
        ("path,path\n0.png,x\n", "line 1 has to name every column once"),
        ("path,label\n0.png,Cat\n0.png,cat\n", "'Cat' and 'cat', which differ in case alone"),
        ("path,label,split\n0.png,x,later\n", "'later'; known are train"),
        ("path,label\n", "no pictures to train on"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    picture(tmp_path, "0.png")
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(MetaMoEError, match=message):
        find_pictures(tmp_path, Data())


def test_parts_have_the_names_and_shares_that_settings_give(tmp_path: Path) -> None:
    for part in ("fit", "check"):
        for number in range(20):
            picture(tmp_path / "pets", f"{part}/dog/{number}.png", number)
    data = Data(source="images", folder=str(tmp_path), splits={"train": "fit", "test": "check", "validation-fraction": 0.25})
    sizes = {split: len(load_images(data, "pets", split, "")) for split in ("train", "validation", "test")}
    assert sizes == {"train": 15, "validation": 5, "test": 20}
    halves = data.model_copy(update={"splits": data.splits.model_copy(update={"test": "", "test_fraction": 0.5})})
    assert len(load_images(halves, "pets", "test", "")) == 10
    other = data.model_copy(update={"splits": data.splits.model_copy(update={"test": "late"})})
    with pytest.raises(DataFormatError, match=r"data.splits.test = 'late': .* has only check, fit"):
        load_images(other, "pets", "train", "")


def test_damage_behind_the_first_page_is_said_and_the_page_used(tmp_path: Path) -> None:
    ARROW.save(tmp_path / "whole.tiff", save_all=True, append_images=[Image.new("L", (32, 32))])
    content = (tmp_path / "whole.tiff").read_bytes()
    file = tmp_path / "half.tiff"
    file.write_bytes(content[: len(content) // 2])
    assert np.array_equal(np.asarray(read_picture(file, "white")), SEEN)
    assert look_at(file, "white").unusual == ["damaged behind its first page or frame"]
