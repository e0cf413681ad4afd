"""The public set's features on disk: in shards, resumable, the same from anywhere."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ray.cluster_utils import Cluster

from metamoe.common.config import Settings
from metamoe.common.data.datasets import fingerprint, load_public, public_fingerprint
from metamoe.common.data.pixels import batches
from metamoe.common.errors import PublicDataMismatchError, RunFailedError, SeedMismatchError
from metamoe.common.model.seed import Seed, load_seed
from metamoe.common.model.vectors import batch_features
from metamoe.common.presets import changed
from metamoe.server import embedding
from metamoe.server.embedding import public_features, shards
from metamoe.simulations.embed import _shard, embed_public


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data that is made once stays where it is; embeddings go to a cache of the test's own."""
    monkeypatch.setattr(embedding, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(embedding, "SHARD", 64)


def features(seed: Seed, settings: Settings, compute=None) -> np.memmap:
    public = load_public(settings.data)
    return public_features(
        seed, settings.data, seed.ffn_paths, public, public_fingerprint(settings.data), lambda _done, _total: None, compute
    )


def test_shards_are_every_row_once() -> None:
    assert [row for rows in shards(300) for row in rows] == list(range(300))
    assert [len(rows) for rows in shards(130)] == [64, 64, 2]


def test_they_are_the_seeds_and_nothing_is_left_beside_them(seed: Seed, small: Settings, tmp_path: Path) -> None:
    found = features(seed, small)
    expected = torch.cat([batch_features(seed.model, seed.ffn_paths, part) for part in batches(seed, load_public(small.data))])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert {file.suffix for file in (tmp_path / "embeddings").iterdir()} <= {".f32", ".lock"}


def test_what_is_stopped_goes_on_without_doing_work_twice(seed: Seed, small: Settings, tmp_path: Path) -> None:
    asked: list[range] = []

    def stops_after_two(missing):
        for number, rows in enumerate(missing):
            if number == 2:
                raise KeyboardInterrupt
            asked.append(rows)
            yield rows, embedding.embed_shard(seed, small.data, seed.ffn_paths, load_public(small.data), rows)

    def goes_on(missing):
        for rows in reversed(missing):
            asked.append(rows)
            yield rows, embedding.embed_shard(seed, small.data, seed.ffn_paths, load_public(small.data), rows)

    with pytest.raises(KeyboardInterrupt):
        features(seed, small, stops_after_two)
    resumed = np.array(features(seed, small, goes_on))
    assert sorted(rows.start for rows in asked) == [rows.start for rows in shards(300)]
    for file in (tmp_path / "embeddings").glob("*.f32"):
        file.unlink()
    np.testing.assert_array_equal(resumed, features(seed, small))


def test_a_file_that_was_cut_short_is_made_again(seed: Seed, small: Settings, tmp_path: Path) -> None:
    whole = np.array(features(seed, small))
    (file,) = (tmp_path / "embeddings").glob("*.f32")
    file.write_bytes(file.read_bytes()[:-4])
    np.testing.assert_array_equal(features(seed, small), whole)


def test_a_cluster_out_of_reach_is_named(small: Settings) -> None:
    with pytest.raises(RunFailedError, match=r"--ray-address nonsense://x"):
        embed_public(small, "nonsense://x", lambda _done, _total: None)


def test_a_machine_with_other_public_samples_is_found_out(small: Settings) -> None:
    rows = range(0, 64)
    seed, ends = load_seed(small.seed_model).fingerprint, fingerprint(load_public(small.data).select([0, 63]))
    paths = load_seed(small.seed_model).ffn_paths
    assert _shard(small.model_dump_json(), paths, rows, seed, ends).shape == (64, 3, 16)
    other = changed(small, ["data.public-samples=290"]).model_dump_json()
    with pytest.raises(PublicDataMismatchError, match="rows 0 to 63"):
        _shard(other, paths, rows, seed, ends)
    with pytest.raises(SeedMismatchError, match="the driver's 000000000000"):
        _shard(small.model_dump_json(), paths, rows, "0" * 64, ends)


@pytest.mark.slow
def test_two_nodes_of_a_ray_cluster_give_what_one_process_gives(small: Settings, tmp_path: Path) -> None:
    settings = changed(small, ["compute.server-threads=1"])
    alone = np.fromfile(embed_public(settings, None, lambda _done, _total: None), np.float32)
    for file in (tmp_path / "embeddings").glob("*.f32"):
        file.unlink()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        seen: list[int] = []
        shared = embed_public(settings, cluster.address, lambda done, _total: seen.append(done))
        np.testing.assert_array_equal(np.fromfile(shared, np.float32), alone)
        assert seen[0] == 0
        assert seen[-1] == 300
    finally:
        cluster.shutdown()
