import unicodedata

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from metamoe.common.config import Data, Settings
from metamoe.common.data import datasets, glyphs, images
from metamoe.common.data.datasets import (
    check_domains,
    evaluation_sets,
    fingerprint,
    held_out_public,
    known_classes,
    load_domain,
    load_private,
    load_public,
)
from metamoe.common.data.pixels import batches
from metamoe.common.errors import EmptyPartitionError, InvalidSettingError
from metamoe.common.model.seed import Seed
from metamoe.common.presets import validated

DATA = validated({}).data


def test_clients_take_the_domains_in_turn() -> None:
    assert validated({"clients": 3}).client_names == ["digits", "greek", "arrows"]
    assert validated({"clients": 5}).client_names == ["digits-1", "greek-1", "arrows", "digits-2", "greek-2"]
    assert validated({"clients": 1}).client_names == ["digits"]


def test_clients_of_a_domain_share_it() -> None:
    settings = validated({"clients": 6})
    whole = load_domain(settings.data, "digits", "train")
    parts = [load_private(settings, client, "train") for client in (0, 3)]
    assert sum(map(len, parts)) == len(whole)
    assert len(load_private(settings, 3, "test")) == 500


def test_an_empty_partition_is_an_error() -> None:
    settings = validated({"clients": 300, "data": {"domains": ["digits"], "dirichlet": 0.001}})
    with pytest.raises(EmptyPartitionError, match="300 clients share 'digits'"):
        [load_private(settings, client, "train") for client in range(300)]


def test_domains_that_do_not_exist_are_named() -> None:
    with pytest.raises(InvalidSettingError, match=r"'runes'.*digits, greek, arrows"):
        check_domains(validated({"data": {"domains": ["greek", "runes"]}}).data)


def test_public_and_private_classes_are_apart() -> None:
    public = set(load_public(DATA).features["label"].names)
    assert not public & set(glyphs.class_names("greek"))
    assert not public & set(glyphs.class_names("arrows"))
    # As dogs stay in ImageNet, printed digits stay public.
    assert set(glyphs.class_names("digits")) <= public
    assert set(known_classes(DATA)) == public | set(glyphs.class_names("greek")) | set(glyphs.class_names("arrows"))
    assert all(unicodedata.lookup(name) for name in glyphs.class_names("greek"))


def test_sizes() -> None:
    assert len(load_public(DATA)) > 20_000
    assert len(load_public(DATA, "test")) == glyphs.PUBLIC_HELD_OUT
    held_out, train = (set(load_public(DATA, split)["label"]) for split in ("test", "train"))
    assert held_out <= train
    for domain in glyphs.DOMAINS:
        assert len(load_domain(DATA, domain, "test")) >= 500


@pytest.mark.parametrize("domain", glyphs.DOMAINS)
def test_a_domain_is_a_function_of_its_seed_and_its_parts_are_disjoint(domain: str) -> None:
    again = glyphs.private(domain, "validation")
    assert fingerprint(again) == fingerprint(load_domain(DATA, domain, "validation"))
    assert fingerprint(glyphs.private(domain, "validation", seed=1)) != fingerprint(again)
    parts = [{image.tobytes() for image in load_domain(DATA, domain, split)["image"]} for split in glyphs.SPLITS]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert load_domain(DATA, domain, "train")[0]["image"].size == (32, 32)


def test_corruptions_of_a_hand_computed_image() -> None:
    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=["a", "b"])})
    pixels = np.full((9, 9), 200, dtype=np.uint8)
    pixels[4, 4] = 0
    data = Dataset.from_dict({"image": [PILImage.fromarray(pixels)] * 2, "label": [1, 0]}, features=features)
    changed = {how: glyphs.corrupted(data, how) for how in ("blur", "noise", "inversion")}
    assert all(other["label"] == [1, 0] for other in changed.values())
    np.testing.assert_array_equal(np.asarray(changed["inversion"][0]["image"]), 255 - pixels)
    blurred = np.asarray(changed["blur"][0]["image"])
    # The dark point spreads to its neighbours, and far from it nothing happens.
    assert 100 < blurred[4, 4] < 200
    assert blurred[4, 5] < 200
    assert blurred[0, 0] == 200
    noise = np.asarray(changed["noise"][0]["image"]).astype(float) - pixels
    # Cut off at 255, so the upper half is smaller; 81 draws of standard deviation 50.
    assert 30 < np.abs(noise).max() < 200
    assert not np.array_equal(changed["noise"][0]["image"], changed["noise"][1]["image"])


def test_what_is_evaluated_follows_the_settings() -> None:
    assert list(evaluation_sets(DATA)) == ["digits", "greek", "arrows"]
    corrupted = validated({"data": {"test-corruptions": ["blur", "inversion"], "domains": ["greek"]}}).data
    sets = evaluation_sets(corrupted)
    assert list(sets) == ["greek, blur", "greek, inversion"]
    original = load_domain(DATA, "greek", "test")
    assert sets["greek, inversion"]["label"] == original["label"]
    validation = validated({"data": {"evaluate-on": "validation"}}).data
    assert fingerprint(evaluation_sets(validation)["greek"]) == fingerprint(load_domain(DATA, "greek", "validation"))
    # Nothing of the held-out public part is looked at while settings are chosen.
    seen = {image.tobytes() for image in held_out_public(validation)["image"]}
    assert seen <= {image.tobytes() for image in load_public(DATA)["image"]}


def test_public_classes_can_be_left_out_by_their_words() -> None:
    without = validated({"data": {"public-without": ["DIGIT", "LETTER"]}}).data
    public = load_public(without)
    names = public.features["label"].names
    left = {names[label] for label in public["label"]}
    assert "DIGIT ONE" not in left
    assert not any("LETTER" in name.split() for name in left)
    assert "WHITE CIRCLE" in left
    # Class names stay, so that models of both kinds name classes alike; the held-out part stays too.
    assert names == load_public(DATA).features["label"].names
    assert len(load_public(without, "test")) == glyphs.PUBLIC_HELD_OUT
    everything = sorted({word for name in names for word in name.split()})
    with pytest.raises(InvalidSettingError, match="leaves no public sample"):
        load_public(validated({"data": {"public-without": everything}}).data)


def test_the_hash_of_a_public_set_is_kept_until_one_of_its_files_changes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    for part in ("train", "test"):
        for name in ("circle", "square"):
            (tmp_path / "shapes" / part / name).mkdir(parents=True)
            PILImage.new("RGB", (8, 8), "red").save(tmp_path / "shapes" / part / name / "1.png")
    data = Data(source="images", domains=("shapes",), folder=str(tmp_path), public="shapes")
    computed = []
    real = datasets.fingerprint
    monkeypatch.setattr(datasets, "fingerprint", lambda dataset: computed.append(1) or real(dataset))

    def asked_by_a_new_process() -> str:
        for cached in (datasets.load_public, datasets.public_fingerprint, images._parts):
            cached.cache_clear()
        return datasets.public_fingerprint(data)

    first = asked_by_a_new_process()
    assert asked_by_a_new_process() == first == real(datasets.load_public(data))
    assert len(computed) == 1
    PILImage.new("RGB", (9, 9), "blue").save(tmp_path / "shapes" / "train" / "circle" / "1.png")
    assert asked_by_a_new_process() != first
    assert len(computed) == 2


def test_fingerprint_sees_pixels_labels_names_and_order() -> None:
    def dataset(pixels: list[int], labels: list[int], names: tuple[str, ...] = ("a", "b")) -> Dataset:
        features = Features({"image": Image(mode="L"), "label": ClassLabel(names=list(names))})
        images = [PILImage.new("L", (2, 2), value) for value in pixels]
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    base = fingerprint(dataset([1, 2], [0, 1]))
    assert fingerprint(dataset([1, 2], [0, 1])) == base
    others = [dataset([1, 3], [0, 1]), dataset([1, 2], [1, 1]), dataset([2, 1], [1, 0]), dataset([1, 2], [0, 1], ("a", "c"))]
    assert len({base, *map(fingerprint, others)}) == 5


def test_images_decoded_by_workers_are_the_same_and_in_order(seed: Seed, settings: Settings) -> None:
    data = load_private(settings, 0, "train").select(range(50))
    torch.manual_seed(3)
    here, ahead = list(batches(seed, data, 16)), list(batches(seed, data, 16, workers=2))
    # The run's own random numbers are untouched.
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    assert [len(part) for part in ahead] == [16, 16, 16, 2]
    assert all(torch.equal(*parts) for parts in zip(here, ahead, strict=True))
