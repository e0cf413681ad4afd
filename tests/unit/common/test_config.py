from pathlib import Path

import pytest

from metamoe.common.config import Settings
from metamoe.common.errors import (
    InvalidSettingError,
    MetaMoEError,
    PresetNotFoundError,
    ProxyCountError,
    UnknownSettingError,
    by_code,
)
from metamoe.common.presets import load_settings, preset_names, to_toml


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_opens_with_its_command(name: str) -> None:
    assert load_settings(name).preset == name
    assert (
        (Path(__file__).parents[3] / "common" / "presets" / f"{name}.toml")
        .read_text()
        .startswith(f"# metamoe simulate --preset {name}")
    )


def test_overrides_and_files(tmp_path: Path) -> None:
    settings = load_settings(
        "glyphs", ["router.top-k=2", "proxies.count=7", "data.domains=['greek']", "router.rows=dot", "clients=4"]
    )
    assert (settings.router.top_k, settings.proxies.count, settings.data.domains, settings.clients) == (2, 7, ("greek",), 4)
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(settings))
    assert load_settings(str(file)) == settings


def test_values_of_python_are_settings_too(tmp_path: Path) -> None:
    """Under their whole names or in groups, with either mark between words; a group keeps what is not named."""
    wanted = load_settings(
        "glyphs", ["proxies.count=7", "router.top-k=1", "router.renormalise=false", "data.domains=['greek']"]
    )
    for values in (
        {"proxies.count": 7, "router.top-k": 1, "router.renormalise": False, "data.domains": ["greek"]},
        {"proxies": {"count": 7}, "router": {"top_k": 1, "renormalise": False}, "data": {"domains": ("greek",)}},
    ):
        assert load_settings("glyphs", values=values) == wanted
    assert wanted.proxies.pool == load_settings("glyphs").proxies.pool
    # They come after a command line's, and a path is its text.
    assert load_settings("glyphs", ["clients=4"], {"clients": 5}).clients == 5
    assert load_settings("glyphs", values={"seed_model": tmp_path}).seed_model == str(tmp_path)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("nonsense=1", UnknownSettingError, "'nonsense'; known here: clients"),
        ("router.topk=1", UnknownSettingError, "'router.topk'; known here: context"),
        ("seed.x=1", InvalidSettingError, "seed"),
        ("router.rows=best", InvalidSettingError, "router.rows = 'best'.*'fisher', 'dot' or 'fresh'"),
        ("clients=0", InvalidSettingError, "clients = 0.*greater than or equal to 1"),
        ("clients=many", InvalidSettingError, "clients = 'many'"),
        ("expert-training.learning-rate=-1", InvalidSettingError, "learning-rate = -1"),
        ("expert-training.learning-rate=nan", InvalidSettingError, "learning-rate"),
        ("router.top-k=9", InvalidSettingError, "top-k = 9 is more than the 4 experts of clients = 3"),
        ("proxies.count=5000", ProxyCountError, "proxies.count = 5000 is more than proxies.pool = 2000"),
        ("quorum=4", InvalidSettingError, "quorum = 4 is more than clients = 3"),
        ("data.prompt=x", InvalidSettingError, "no {}"),
        ("data.domains=['greek','greek']", InvalidSettingError, "twice"),
        ("no-equals", InvalidSettingError, "key=value"),
        ("=1", InvalidSettingError, "key=value"),
    ],
)
def test_wrong_settings_are_named(override: str, error: type[MetaMoEError], message: str) -> None:
    with pytest.raises(MetaMoEError, match=message) as raised:
        load_settings("glyphs", [override])
    assert type(raised.value) is error


def test_a_lambda_that_could_not_learn_is_refused() -> None:
    changes = ["router.learn-context=true", "router-training.supervision=provenance"]
    with pytest.raises(InvalidSettingError, match="no gradient from provenance"):
        load_settings("glyphs", changes)
    load_settings("glyphs", [*changes, "router.learn-context=false"])
    both = ["router.learn-context=true", "router-training.supervision=both"]
    load_settings("glyphs", both)
    with pytest.raises(InvalidSettingError, match="no gradient from provenance"):
        load_settings("glyphs", [*both, "router.top-k=1"])


@pytest.mark.parametrize(
    ("overrides", "shape"),
    [
        ([], True),
        (["router.vectors=proxy"], False),
        (["router.rows=dot"], False),
        (["privacy.vectors=gaussian"], False),
        (["privacy.vectors=gaussian", "router.statistics=shape"], True),
        (["router.statistics=mean"], False),
        (["router.statistics=shape"], True),
    ],
)
def test_a_shape_is_sent_where_it_can_be_had(overrides: list[str], shape: bool) -> None:
    assert load_settings("glyphs", overrides).by_shape is shape


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router.statistics=shape", "router.rows=dot"], "set vectors = seed and rows = fisher"),
        (["proxies.relevance=gaussian", "router.statistics=mean"], "gaussian needs the clients' shapes"),
        (["quorum=1", "router.top-k=3"], "top-k = 3 is more than the 2 experts of quorum = 1"),
        (["router.decide=per-layer"], "evidence = prefix needs router.decide = once"),
        (["router.decide=per-layer", "router.evidence=layer"], "vectors = seed needs router.decide = once"),
        (["router-training.supervision=task", "router-training.train-router=false"], "neither router nor experts"),
        (["router-training.samples=public", "router-training.supervision=both"], "no client's"),
        (
            [
                "router-training.train-router=false",
                "router-training.train-experts=true",
                "router-training.supervision=provenance",
            ],
            "provenance trains the router alone",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        load_settings("glyphs", overrides)


def test_the_seed_is_one_more_name_only_if_it_is_an_expert() -> None:
    assert load_settings("glyphs").expert_names == ["digits", "greek", "arrows", "seed"]
    assert load_settings("glyphs", ["router.seed-expert=false"]).expert_names == ["digits", "greek", "arrows"]


def test_missing_and_broken_presets(tmp_path: Path) -> None:
    with pytest.raises(PresetNotFoundError, match="glyphs"):
        load_settings("nothing")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(InvalidSettingError, match="not valid TOML"):
        load_settings(str(tmp_path / "bad.toml"))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 1


def test_every_error_has_its_own_exit_code() -> None:
    kinds = [MetaMoEError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert all(by_code(kind.exit_code) is kind for kind in kinds)
    assert by_code(12345) is MetaMoEError
