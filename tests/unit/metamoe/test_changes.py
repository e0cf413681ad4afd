"""A model changed for one client is, bit for bit, that of a run from the beginning; the others compute nothing."""

import json
import shutil
from pathlib import Path

import pytest

import metamoe
from metamoe.changes import Changed, begin, overview
from metamoe.client import answer
from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.arrays import arrays_hash, read_arrays
from metamoe.common.audit.entries import Arrival, Intent, settings_hash
from metamoe.common.audit.policy import DEFAULT, Limits, policy_text
from metamoe.common.audit.verify import check_ledger
from metamoe.common.config import Settings
from metamoe.common.data.datasets import load_public, public_fingerprint
from metamoe.common.errors import InputFileError, InvalidSettingError, RunFailedError, StateFileError
from metamoe.common.model.seed import Seed
from metamoe.common.presets import changed, load_settings, to_toml
from metamoe.common.wire import Request, encode_request, reply_artifacts
from metamoe.server.changes import Change
from metamoe.server.journal import JOURNAL, journal_line, read_journal
from metamoe.server.proxies import read_selections
from metamoe.server.stages import run_stages
from metamoe.server.state import reply_place
from metamoe.simulations.local import run_local
from tests.conftest import small_run


def whole(settings: Settings, out: Path) -> Path:
    """A run from its beginning."""
    out.mkdir(parents=True)
    (out / "settings.toml").write_text(to_toml(settings))
    run_local(settings, out)
    return out


def made(out: Path) -> str:
    return str(json.loads((out / "server" / "summary.json").read_text())["model"])


def change(old: Path, kind: str, client: str, out: Path) -> Changed:
    begun = begin(old, Change(kind, client), out)
    run_local(begun.settings, out)
    return begun


@pytest.fixture(scope="module")
def all_three(finished: Path, seed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three, as a command leaves it."""
    out = tmp_path_factory.mktemp("changes") / "all"
    shutil.copytree(finished, out)
    (out / "settings.toml").write_text(to_toml(small_run(seed_folder)))
    return out


@pytest.fixture(scope="module")
def without_greek(all_three: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Changed]:
    out = tmp_path_factory.mktemp("removed") / "run"
    return out, change(all_three, "remove", "greek", out)


GREEK, DIGITS = (f"experts/{name}/adapter_model.safetensors" for name in ("greek", "digits"))


def small_of(run: Path, *changes: str) -> Settings:
    """The settings of a run, and others."""
    return changed(load_settings(str(run / "settings.toml")), list(changes))


def asked_in_last_run(out: Path, client: int) -> dict[str, list[str]]:
    """What left a client in the last run that its ledger has: the arrays' names by stage."""
    ledger = check_ledger(out / "clients" / "audit" / f"client-{client}")
    return {intent.stage: [array.name for array in intent.arrays] for intent in ledger.of(Intent, ledger.runs[-1])}


def fine(out: Path) -> bool:
    return metamoe.audit.verify(out).fine


def test_a_removed_client_was_never_there(
    without_greek: tuple[Path, Changed], all_three: Path, small: Settings, tmp_path: Path
) -> None:
    out, begun = without_greek
    assert begun.asked == {"digits": [], "arrows": []}
    assert begun.said == ["taken over, and asked nothing: digits, arrows"]
    expected = whole(changed(small, ["without=['greek']"]), tmp_path / "whole")
    assert made(out) == made(expected) != made(all_three)
    # To the file, what the server keeps of the others too.
    for part in ("model", "server/experts"):
        files = {f.relative_to(out): f.read_bytes() for f in (out / part).rglob("*") if f.is_file() and f.name != "README.md"}
        assert files == {f: (expected / f).read_bytes() for f in files}
    assert (out / "proxies.json").read_bytes() == (expected / "proxies.json").read_bytes()
    assert (all_three / "server" / "experts" / "greek").is_dir()


def test_the_removed_expert_is_nowhere_and_the_record_says_where_it_was(
    without_greek: tuple[Path, Changed], all_three: Path
) -> None:
    out, _ = without_greek
    matrices = (all_three / "server" / "experts" / "greek" / "adapter_model.safetensors").read_bytes()[-64:]
    assert not any(matrices in file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert not list(out.rglob("*greek*"))
    (line,) = (json.loads(text) for text in (out / "changes.jsonl").read_text().splitlines())
    assert (line["change"], line["client"], line["from"]["model"]) == ("remove", "greek", made(all_three))
    server = check_ledger(out / "server" / "audit")
    assert line["run"] == server.runs[-1] != line["from"]["run"] == server.runs[0]
    arrived = [(a.stage, a.message) for a in server.of(Arrival) if a.client == 1 and a.stage != "deliver"]
    assert [(message["stage"], message["message"]) for message in line["gone"]] == arrived
    assert [stage for stage, _ in arrived] == ["profile", "expert"]


def test_the_others_say_who_they_are_and_receive_the_model(without_greek: tuple[Path, Changed]) -> None:
    out, _ = without_greek
    for client, name in ((0, "digits"), (2, "arrows")):
        asked = asked_in_last_run(out, client)
        assert asked == {"profile": ["client", "audit-key"], "deliver": ["ledger-root", "ledger-signature"]}
        assert json.loads((out / "clients" / name / "accuracy.json").read_text())["model"] == made(out)
    assert fine(out)
    summary = json.loads((out / "server" / "summary.json").read_text())
    assert [(client["name"], client["bytes_up"]) for client in summary["clients"]] == [("digits", 8), ("arrows", 8)]


def test_who_comes_back_alone_computes(without_greek: tuple[Path, Changed], all_three: Path, tmp_path: Path) -> None:
    out = tmp_path / "back"
    begun = change(without_greek[0] / "model", "add", "greek", out)
    assert begun.asked == {"digits": [], "greek": ["profile", "expert"], "arrows": []}
    assert made(out) == made(all_three)
    assert list(asked_in_last_run(out, 1)) == ["profile", "expert", "deliver"]
    assert len(asked_in_last_run(out, 1)["profile"]) > 2
    assert list(asked_in_last_run(out, 0)) == ["profile", "deliver"]
    assert fine(out)
    found = overview(out)
    assert [change["change"] for change in found.changes] == ["remove", "add"]
    first, last = found.changes[0]["from"]["run"], found.changes[1]["run"]
    assert [(expert.name, expert.sent_in) for expert in found.experts] == [
        ("digits", first),
        ("greek", last),
        ("arrows", first),
    ]


@pytest.fixture(scope="module")
def with_numerals(all_three: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Changed]:
    """A fourth client in a new place, where all have the product's policy."""
    out = tmp_path_factory.mktemp("added") / "run"
    policy = out.with_name("policy.toml")
    policy.write_text(policy_text(DEFAULT.model_copy(update={"limits": Limits(reply_time_step=0)})))
    begun = begin(all_three, Change("add", "numerals"), out)

    def ask(kind, requests):
        for client, content in requests.items():
            site = Site(client, out / "clients", policy=policy, simulation=False)
            yield client, audited(kind, content, site, lambda c, site=site: respond(kind, c, site))

    run_stages(begun.settings, range(4), ask, out)
    return out, begun


def test_a_fourth_beside_three_is_four(with_numerals: tuple[Path, Changed], small: Settings, tmp_path: Path) -> None:
    """The policy keeps to the number of clients of the first run; who is asked nothing does not mind a place more."""
    out, begun = with_numerals
    four = ["clients=4", "data.domains=['digits', 'greek', 'arrows', 'numerals']"]
    assert made(out) == made(whole(changed(small, four), tmp_path / "four"))
    assert begun.asked == {"digits": [], "greek": [], "arrows": [], "numerals": ["profile", "expert"]}
    assert asked_in_last_run(out, 0) == {"profile": ["client", "audit-key"], "deliver": ["ledger-root", "ledger-signature"]}
    assert fine(out)


@pytest.mark.slow
def test_three_of_four_are_three(with_numerals: tuple[Path, Changed], tmp_path: Path) -> None:
    begun = change(with_numerals[0], "remove", "digits", tmp_path / "run")
    assert not any(begun.asked.values())
    assert made(tmp_path / "run") == made(whole(begun.settings, tmp_path / "whole"))


def test_who_is_refreshed_is_asked_anew(all_three: Path, tmp_path: Path) -> None:
    run = metamoe.open_run(all_three)
    begun = begin(run.folder, Change("refresh", "greek"), tmp_path / "run")
    assert begun.asked == {"digits": [], "greek": ["profile", "expert"], "arrows": []}
    assert not (tmp_path / "run" / "server" / "experts" / "greek").exists()
    run_local(begun.settings, tmp_path / "run")
    # Its data is what it was.
    assert made(tmp_path / "run") == made(all_three)
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "changes.jsonl").read_text().splitlines())
    assert [message["stage"] for message in line["gone"]] == ["profile", "expert"]


@pytest.fixture(scope="module")
def with_more_public(all_three: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Changed]:
    """Greek's proxies out of 340 public samples, of which 300 are those that all had."""
    out = tmp_path_factory.mktemp("public") / "run"
    begun = begin(all_three, Change("refresh", "greek", ("data.public-samples=340",)), out)
    run_local(begun.settings, out)
    return out, begun


@pytest.mark.slow
def test_one_client_gets_proxies_of_another_public_set_and_the_others_keep_theirs(
    with_more_public: tuple[Path, Changed], all_three: Path, tmp_path: Path
) -> None:
    out, begun = with_more_public
    # Shapes are in coordinates of the public set, experts are not.
    assert begun.asked == {"digits": ["profile"], "greek": ["profile", "expert"], "arrows": ["profile"]}
    assert not begun.from_beginning
    assert "digits is asked again for its profile: it goes by the public set" in begun.said
    assert list(asked_in_last_run(out, 0)) == ["profile", "deliver"]
    assert fine(out)
    expected = whole(begun.settings, tmp_path / "whole")
    before, after, anew = (read_selections(run / "proxies.json") for run in (all_three, out, expected))
    old, new = load_public(small_of(all_three).data), load_public(begun.settings.data)
    for name in ("digits", "arrows"):
        kept = [old[int(row)]["image"].tobytes() for row in before[name].ids]
        assert [new[int(row)]["image"].tobytes() for row in after[name].ids] == kept
        assert after[name].ids.tolist() != anew[name].ids.tolist()
    assert after["greek"].ids.tolist() == anew["greek"].ids.tolist() != before["greek"].ids.tolist()

    def sent(run: Path, what: str) -> bytes:
        return (run / "server" / what).read_bytes()

    # All that each said: of greek and of all profiles what a run from the beginning has, of the other experts what they were.
    assert sent(out, GREEK) == sent(expected, GREEK) != sent(all_three, GREEK)
    assert sent(out, DIGITS) == sent(all_three, DIGITS) != sent(expected, DIGITS)
    for name in ("digits", "greek", "arrows"):
        said = [arrays_hash(read_arrays(reply_place(run, "profile", name))[0]) for run in (out, expected, all_three)]
        assert said[0] == said[1] != said[2]
    (line,) = (json.loads(text) for text in (out / "changes.jsonl").read_text().splitlines())
    assert line["public"] == public_fingerprint(begun.settings.data)


@pytest.mark.slow
def test_what_was_kept_is_kept_in_the_next_change(with_more_public: tuple[Path, Changed], tmp_path: Path) -> None:
    begun = change(with_more_public[0], "remove", "greek", tmp_path / "run")
    assert begun.said[0] == "taken over, and asked nothing: digits, arrows"
    assert begun.said[1].startswith(
        "digits, arrows keep proxies that were chosen out of an earlier public set: this is the model of no"
    )
    assert begun.asked == {"digits": [], "arrows": []}
    assert asked_in_last_run(tmp_path / "run", 0)["profile"] == ["client", "audit-key"]
    assert list(asked_in_last_run(tmp_path / "run", 0)) == ["profile", "deliver"]


def test_means_are_taken_over_under_another_public_set(all_three: Path, tmp_path: Path) -> None:
    """Means are of private samples alone."""
    old, settings = tmp_path / "old", small_of(all_three, "router.statistics=mean")
    shutil.copytree(all_three, old)
    (old / "settings.toml").write_text(to_toml(settings))
    lines = read_journal(old)
    lines[0]["settings"] = settings_hash(settings)
    (old / "server" / JOURNAL).write_bytes(b"".join(map(journal_line, lines)))
    begun = begin(old, Change("refresh", "greek", ("data.public-samples=340",)), tmp_path / "run")
    assert begun.asked == {"digits": [], "greek": ["profile", "expert"], "arrows": []}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.public-samples=200", r"of digits's 20 proxies, on which its expert was trained, are not in this public set"),
        ("data.public-samples=300", "the public set stays what it was; leave it out"),
        ("lora.rank=3", "with other settings all would begin anew, so make a new run"),
    ],
)
def test_a_public_set_that_cannot_be_is_refused(all_three: Path, tmp_path: Path, setting: str, words: str) -> None:
    with pytest.raises(InvalidSettingError, match=words):
        begin(all_three, Change("refresh", "greek", (setting,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_proxies_that_are_no_longer_there_cannot_be_kept(all_three: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(all_three, old)
    (old / "proxies.json").unlink()
    with pytest.raises(StateFileError, match=r"its proxies.json, is not what it was"):
        begin(old, Change("refresh", "greek", ("data.public-samples=340",)), tmp_path / "run")


def test_an_expert_that_answers_other_proxies_is_asked_for_again(
    all_three: Path, without_greek: tuple[Path, Changed], tmp_path: Path
) -> None:
    begun = begin(all_three, Change("remove", "greek"), tmp_path / "run")
    journal = tmp_path / "run" / "server" / JOURNAL
    lines = read_journal(tmp_path / "run")
    for line in lines:
        if (line.get("kind"), line.get("name")) == ("expert", "digits"):
            line["asked"] = "0" * 64
    journal.write_bytes(b"".join(map(journal_line, lines)))
    run_local(begun.settings, tmp_path / "run")
    assert list(asked_in_last_run(tmp_path / "run", 0)) == ["profile", "expert", "deliver"]
    assert list(asked_in_last_run(tmp_path / "run", 2)) == ["profile", "deliver"]
    assert made(tmp_path / "run") == made(without_greek[0])


@pytest.mark.parametrize("what", ["proxies", "expert"])
def test_what_is_damaged_is_asked_for_again(
    all_three: Path, without_greek: tuple[Path, Changed], tmp_path: Path, what: str
) -> None:
    old = tmp_path / "old"
    shutil.copytree(all_three, old)
    harmed = old / {"proxies": "proxies.json", "expert": "server/experts/digits/adapter_model.safetensors"}[what]
    content = bytearray(harmed.read_bytes())
    content[len(content) // 2] ^= 1
    harmed.write_bytes(content)
    begun = begin(old, Change("remove", "greek"), tmp_path / "run")
    assert begun.asked == {"digits": ["expert"], "arrows": ["expert"] if what == "proxies" else []}
    assert begun.said[0] == "digits is asked again for its expert: it is no longer whole here"
    if what == "expert":
        run_local(begun.settings, tmp_path / "run")
        assert made(tmp_path / "run") == made(without_greek[0])


@pytest.mark.slow
def test_merged_experts_are_merged_anew(small: Settings, tmp_path: Path) -> None:
    two = changed(small, ["experts.max=2", "clients=4"])
    old = whole(two, tmp_path / "old")
    merged = next(expert for expert in overview(old).experts if len(expert.clients) > 1)
    begun = change(old, "remove", merged.clients[0], tmp_path / "run")
    assert begun.said[0] == (
        f"{merged.name} was merged of {', '.join(merged.clients)}; it is made anew of the experts that these sent"
    )
    assert not any(begun.asked.values())
    assert made(tmp_path / "run") == made(whole(begun.settings, tmp_path / "whole"))


def test_a_missing_client_stays_out_until_it_is_added(small: Settings, tmp_path: Path) -> None:
    old, settings = tmp_path / "old", changed(small, ["quorum=2", "clients=3"])
    old.mkdir()
    (old / "settings.toml").write_text(to_toml(settings))

    def ask(kind, requests):
        for client, content in requests.items():
            if client == 1:
                yield client, RunFailedError("out of reach")
            else:
                site = Site(client, old / "clients")
                yield client, audited(kind, content, site, lambda c, site=site: respond(kind, c, site))

    run_stages(settings, range(3), ask, old)
    begun = begin(old, Change("refresh", "digits"), tmp_path / "refreshed")
    assert begun.settings.without == ("greek",)
    assert begun.said[0].startswith("greek was missing in ")
    begun = begin(old, Change("add", "greek"), tmp_path / "added")
    assert begun.settings == settings
    assert begun.asked == {"digits": [], "greek": ["profile", "expert"], "arrows": []}


def test_what_cannot_be_is_refused(all_three: Path, small: Settings, tmp_path: Path, seed_folder: Path) -> None:
    out = tmp_path / "run"
    for kind, client, words in (
        ("remove", "nobody", "'nobody' has no part in the model; digits, greek, arrows have"),
        ("refresh", "seed", "'seed' has no part"),
        ("add", "digits", "'metamoe model refresh' asks it anew"),
        ("add", "klingon", "data.domains has 'klingon'"),
    ):
        with pytest.raises(InvalidSettingError, match=words):
            begin(all_three, Change(kind, client), out)
        assert not out.exists()
    with pytest.raises(InputFileError, match="is not an empty folder"):
        begin(all_three, Change("remove", "greek"), all_three)
    with pytest.raises(InputFileError, match=r"neither a run's folder nor the model in one"):
        begin(seed_folder, Change("remove", "greek"), out)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(all_three, unfinished)
    (unfinished / "settings.toml").write_text(to_toml(changed(small, ["seed=1"])))
    with pytest.raises(StateFileError, match=r"settings.toml is not what the run in .* began with"):
        begin(unfinished, Change("remove", "greek"), out)
    (unfinished / "settings.toml").write_text(to_toml(changed(small, ["clients=4"])))
    with pytest.raises(InvalidSettingError, match="would change what others have"):
        begin(unfinished, Change("add", "numerals"), out)
    (unfinished / "server" / "summary.json").unlink()
    with pytest.raises(RunFailedError, match="go on with it first"):
        begin(unfinished, Change("remove", "greek"), out)


def test_a_known_client_looks_at_no_data(small: Settings, seed: Seed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "private_samples", lambda *_: pytest.fail("it looked at its samples"))
    monkeypatch.setattr(answer, "_check_common_ground", lambda *_: None)
    arrays = answer.answer("profile", Request(small, "a" * 64, "b" * 64, {}, known=[1]), Site(1, tmp_path))
    assert {name: array.tolist() for name, array in arrays.items()} == {"client": 1}
    assert [artifact.name for artifact in reply_artifacts("profile", small, seed, introduced=True)] == ["client"]


def test_a_client_that_the_run_is_without_says_nothing(small: Settings, seed: Seed, tmp_path: Path) -> None:
    settings = changed(small, ["without=['greek']"])
    content = encode_request(Request(settings, seed.fingerprint, public_fingerprint(settings.data), {}))
    with pytest.raises(InvalidSettingError, match="this is client greek, and the run is without it"):
        audited("profile", content, Site(1, tmp_path), lambda _: pytest.fail("it computed"))
    assert not (tmp_path / "audit").exists()


@pytest.mark.slow
def test_over_flower_it_is_the_same(all_three: Path, without_greek: tuple[Path, Changed], tmp_path: Path) -> None:
    """Out of one process to Ray and back: the same folder goes on anywhere."""
    begin(all_three, Change("remove", "greek"), tmp_path / "removed")
    (tmp_path / "removed" / "flower").mkdir()
    removed = metamoe.resume(tmp_path / "removed")
    assert made(removed.folder) == made(without_greek[0])
    assert fine(removed.folder)
    # Its node is there, and says nothing.
    assert len(check_ledger(removed.folder / "clients" / "audit" / "client-1").runs) == 1
    back = removed.add("greek", tmp_path / "back")
    assert (back.folder / "flower").is_dir()
    assert made(back.folder) == made(all_three)
    assert fine(back.folder)
    assert list(asked_in_last_run(back.folder, 0)) == ["profile", "deliver"]
