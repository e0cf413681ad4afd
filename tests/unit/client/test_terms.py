"""What a server may ask over all runs: a curious one tries settings, runs and poisoned parts, and gets one statistic."""

import secrets
import shutil
import tomllib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from metamoe.client import answer, egress
from metamoe.client.app import respond
from metamoe.client.egress import audited
from metamoe.client.site import Site
from metamoe.common.audit.entries import Intent
from metamoe.common.audit.ledger import Ledger
from metamoe.common.audit.policy import DEFAULT, SIMULATION, Between, Budget, Policy, policy_text
from metamoe.common.audit.terms import Terms, check_terms
from metamoe.common.audit.touching import touching, touching_names
from metamoe.common.audit.verify import Verdict, check_ledger, worst
from metamoe.common.config import Settings
from metamoe.common.data.datasets import public_fingerprint
from metamoe.common.errors import PolicyError, PublicDataMismatchError, SeedMismatchError
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed
from metamoe.common.wire import ARRAYS, Envelope, Kind, RecordDict, Request, encode_reply, encode_request
from tests.unit.client.test_egress import VECTOR, honest, request, written

pytestmark = pytest.mark.usefixtures("identity")

PROMPT = DEFAULT.model_copy(update={"limits": DEFAULT.limits.model_copy(update={"reply_time_step": 0.0})})
"""The product's own policy, but for waiting."""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(0, tmp_path / "state", policy=written(PROMPT, tmp_path), simulation=False)


def sent(settings: Settings, site: Site, kind: Kind = "profile", first_proxy: int = 0) -> RecordDict:
    """What the real app answers, in a new run."""
    return audited(kind, request(settings, kind, first_proxy=first_proxy), site, partial(respond, kind, site=site))


def refused(content: RecordDict, site: Site, reason: str, kind: Kind = "profile") -> None:
    """Nothing is computed, and the reason names the rule."""
    with pytest.raises(PolicyError, match=reason):
        audited(kind, content, site, lambda _: pytest.fail("computed"))


ATTEMPTS: dict[str, Sequence[str]] = {
    "another random half: the published attack": ("seed=1",),
    "one sample fewer: the difference is the sample": ("data.private-samples=39",),
    "all samples but those of one run": ("data.private-samples=0",),
    "another number of clients, so that a domain is divided": ("clients=6",),
    "another concentration of the classes": ("clients=6", "data.dirichlet=0.01"),
    "another domain's samples": ('data.domains=["greek", "digits", "arrows"]',),
    "another prompt": ("data.prompt=a photo of {}",),
    "a text cut after its first token": ("data.prompt-tokens=1",),
    "another public set": ("data.public-samples=299",),
    "a public set without some words": ('data.public-without=["DIGIT"]',),
    "other layers": ("lora.first-layer=0",),
    "another rank, so another expert": ("lora.rank=3",),
    "one pass more over the samples": ("expert-training.epochs=2",),
    "a step so large that the last batch is all that is left": ("expert-training.learning-rate=1000.0",),
    "batches of one sample": ("expert-training.batch-size=1",),
    "an expert of private samples alone": ("expert-training.samples=private",),
    "other rounding": ("compute.precision=bfloat16",),
    "other sums": ("compute.micro-batch-size=1",),
    "noise that is none": ("privacy.vectors=gaussian", "privacy.min-samples=30", "privacy.epsilon=1e9"),
    "means that are clipped elsewhere": ("privacy.clip=1e-6",),
    "another kind of relevance": ("proxies.relevance=classifier",),
    "no means, so another answer": ("proxies.selection=random", "router.vectors=proxy"),
    "means in the expert": ("router.vectors=private",),
    "accuracy": ("report-accuracy=true",),
    "evaluation on other samples": ("data.evaluate-on=validation",),
}


@pytest.mark.parametrize("change", ATTEMPTS.values(), ids=ATTEMPTS)
def test_after_the_first_run_a_server_chooses_nothing_that_touches_private_data(
    small: Settings, site: Site, change: Sequence[str]
) -> None:
    assert len(ATTEMPTS) >= 12
    sent(small, site)
    refused(request(changed(small, change)), site, r"rule settings|rule public-sets")
    assert worst(f for f in check_ledger(site.audit).findings if f.verdict is not Verdict.INCOMPLETE) is Verdict.FINE


MORE = ("clients=4", 'data.domains=["digits", "greek", "arrows", "numerals"]')


def idle(settings: Settings, known: Sequence[int] = (0,)) -> RecordDict:
    """A request to clients that only say who they are."""
    hashes = load_seed(settings.seed_model).fingerprint, public_fingerprint(settings.data)
    envelope = Envelope(run=secrets.token_hex(16), message=secrets.token_hex(16))
    return encode_request(Request(settings, *hashes, {}, envelope, known=known))


def test_who_is_asked_nothing_minds_no_places_of_others(small: Settings, site: Site) -> None:
    sent(small, site)
    more = changed(small, MORE)
    reply = audited("profile", idle(more), site, partial(respond, "profile", site=site))
    assert list(reply[ARRAYS]) == ["client"]
    check_terms(PROMPT, Terms(touching(more), "a", "b"), Terms(touching(small), "a", "b"), idle=True)
    # What the gateway and the verifier go by: the run told nothing.
    assert worst(f for f in check_ledger(site.audit).findings if f.verdict is not Verdict.INCOMPLETE) is Verdict.FINE
    # Whoever is asked for more than its name minds them, and so does one whose place would be another.
    refused(idle(more, known=[1]), site, r'clients = 4: .* to allow this: "clients" = \[3, 4\]')
    for change in (("clients=2",), ('data.domains=["greek", "digits", "arrows", "numerals"]',), ("seed=1",)):
        refused(idle(changed(small, change)), site, "rule settings")


def test_an_owner_s_rule_for_places_holds_for_those_who_are_asked_nothing_too(small: Settings, site: Site) -> None:
    sent(small, site)
    site.policy.write_text(policy_text(PROMPT.model_copy(update={"settings": {"clients": [3]}})))
    refused(idle(changed(small, MORE)), site, r"clients = 4 is not what this client's policy allows \(rule settings")
    site.policy.write_text(policy_text(PROMPT.model_copy(update={"settings": {"clients": [3, 4]}})))
    audited("profile", idle(changed(small, MORE)), site, partial(respond, "profile", site=site))


def test_another_seed_model_or_public_set_is_refused_by_its_fingerprint(small: Settings, site: Site) -> None:
    """A folder of the same name may hold another model tomorrow."""
    sent(small, site)
    ours = load_seed(small.seed_model).fingerprint, public_fingerprint(small.data)
    for hashes, rule in (("f" * 64, ours[1]), "seed-models"), ((ours[0], "f" * 64), "public-sets"):
        envelope = Envelope(run=secrets.token_hex(16), message=secrets.token_hex(16))
        refused(encode_request(Request(small, *hashes, {}, envelope)), site, rule)


def test_a_server_that_lies_about_its_seed_gets_nothing(small: Settings, site: Site, tmp_path: Path) -> None:
    """It says the pinned fingerprint, and another model lies under the pinned name: what is loaded is compared."""
    folder = shutil.copytree(small.seed_model, tmp_path / "seed")
    settings = changed(small, [f"seed-model={folder}"])
    sent(settings, site)
    lie = request(settings)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    shutil.rmtree(site.state / "released")
    load_seed.cache_clear()
    with pytest.raises(SeedMismatchError):
        audited("profile", lie, site, partial(respond, "profile", site=site))
    load_seed.cache_clear()


def test_the_server_s_own_work_stays_its_own(small: Settings, site: Site) -> None:
    sent(small, site)
    again = changed(
        small, ["router.renormalise=false", "router.temperature=2", "router-training.epochs=9", "compute.client-threads=2"]
    )
    audited("profile", request(again), site, lambda _: pytest.fail("computed"))


def test_the_same_again_is_sent_as_it_was_in_any_number_of_runs(small: Settings, site: Site) -> None:
    first = {kind: sent(small, site, kind) for kind in ("profile", "expert")}
    for _ in range(5):
        for kind, reply in first.items():
            again = audited(kind, request(small, kind), site, lambda _: pytest.fail("computed"))
            assert {n: a.data for n, a in reply[ARRAYS].items()} == {n: a.data for n, a in again[ARRAYS].items()}
    assert worst(f for f in check_ledger(site.audit).findings if f.verdict is not Verdict.INCOMPLETE) is Verdict.FINE


def test_a_client_that_holds_another_public_set_than_before_says_so_and_sends_nothing_from_its_store(
    small: Settings, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent(small, site)
    asked = request(small)
    for module in (egress, answer):
        monkeypatch.setattr(module, "public_fingerprint", lambda _: "f" * 64)
    with pytest.raises(PublicDataMismatchError, match="this client's is ffff"):
        audited("profile", asked, site, partial(respond, "profile", site=site))


def test_experts_for_other_proxies_are_other_statistics(small: Settings, site: Site) -> None:
    """The server chooses proxies: of each choice comes another function of the same samples. Three, and no more."""
    for first_proxy in range(3):
        audited(
            "expert",
            request(small, "expert", first_proxy=first_proxy),
            site,
            lambda _, k=first_proxy: encode_reply(
                {name: array + np.float16(k) for name, array in honest(small, "expert").items()}
            ),
        )
    refused(request(small, "expert", first_proxy=3), site, r"3 different 'expert'.*max-distinct-statistics = 3", "expert")
    audited("expert", request(small, "expert", first_proxy=1), site, lambda _: pytest.fail("computed"))


def test_a_changed_data_set_is_another_statistic(small: Settings, site: Site, tmp_path: Path) -> None:
    """The owner may add data; a server that sees the means before and after may subtract. Three times, and no more."""
    own = Site(0, site.state, tmp_path / "data", site.policy, simulation=False)
    settings = changed(small, ["clients=1", "data.private=own", 'data.domains=["east"]', "data.private-samples=0"])
    rng, replies = np.random.default_rng(0), []
    for number in range(24):
        file = tmp_path / "data" / "train" / "DIGIT ONE" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
        if 20 <= number < 23:
            replies.append(sent(settings, own)[ARRAYS][VECTOR].data)
    assert len(set(replies)) == 3
    refused(request(settings), own, "max-distinct-statistics = 3")
    (tmp_path / "data" / "train" / "DIGIT ONE" / "23.png").unlink()
    again = audited("profile", request(settings), own, lambda _: pytest.fail("computed"))
    assert again[ARRAYS][VECTOR].data == replies[-1]


def test_noise_without_a_budget_is_drawn_once(small: Settings, site: Site) -> None:
    """Else a server asks again and again, and takes the mean of it."""
    settings = changed(small, ["privacy.vectors=gaussian", "privacy.min-samples=30"])
    first = sent(settings, site)
    again = audited("profile", request(settings), site, lambda _: pytest.fail("computed"))
    assert again[ARRAYS][VECTOR].data == first[ARRAYS][VECTOR].data


def test_noise_under_a_budget_is_no_exact_statistic(small: Settings, tmp_path: Path) -> None:
    policy = PROMPT.model_copy(update={"budget": Budget(epsilon=100.0, delta=1e-5)})
    site = Site(0, tmp_path / "state", policy=written(policy, tmp_path), simulation=False)
    settings = changed(small, ["privacy.vectors=gaussian", "privacy.min-samples=30", "privacy.epsilon=1"])
    replies = {sent(settings, site)[ARRAYS][VECTOR].data for _ in range(5)}
    assert len(replies) == 5


def test_a_single_number_counts_each_time(small: Settings, tmp_path: Path) -> None:
    """An accuracy that comes out alike for another model still tells something of it."""
    allow = {**PROMPT.allow, "accuracy": SIMULATION.allow["accuracy"]}
    site = Site(0, tmp_path / "state", policy=written(PROMPT.model_copy(update={"allow": allow}), tmp_path), simulation=False)
    settings = changed(small, ["report-accuracy=true"])
    for _ in range(3):
        audited("deliver", request(settings, "deliver"), site, lambda _: encode_reply({"accuracy": np.float32(50)}))
    refused(request(settings, "deliver"), site, "3 different 'accuracy'", "deliver")


def test_an_owner_may_let_a_server_choose(small: Settings, tmp_path: Path) -> None:
    """By name: any value, a range, or one of a list. And nothing else."""
    chosen = {"seed": "any", "expert-training.epochs": Between(min=1, max=5), "lora.rank": [2, 4]}
    site = Site(
        0, tmp_path / "state", policy=written(PROMPT.model_copy(update={"settings": chosen}), tmp_path), simulation=False
    )
    sent(small, site)
    for change in ("seed=1", "expert-training.epochs=5"):
        audited("profile", request(changed(small, [change])), site, lambda _: encode_reply(honest(small)))
    for change in ("expert-training.epochs=6", "lora.rank=3", "lora.alpha=5"):
        refused(request(changed(small, [change])), site, rf"{change.partition('=')[0]} = ")


def test_seeds_and_public_sets_can_be_agreed_on_before_the_first_run(small: Settings, tmp_path: Path) -> None:
    ours = load_seed(small.seed_model).fingerprint, public_fingerprint(small.data)
    for seeds, publics, rule in (["e" * 64], [ours[1]], "seed-models"), ([ours[0]], ["e" * 64], "public-sets"):
        policy = written(PROMPT.model_copy(update={"seed_models": seeds, "public_sets": publics}), tmp_path)
        refused(request(small), Site(0, tmp_path / "state", policy=policy, simulation=False), rule)


def test_policies_from_before_load_and_get_the_defaults() -> None:
    old = "version = 1\n" + "".join(f'[allow.{kind}]\npurpose = "{rule.purpose}"\n' for kind, rule in DEFAULT.allow.items())
    policy = Policy.model_validate(tomllib.loads(old))
    assert (policy.settings, policy.seed_models, policy.public_sets, policy.limits.max_distinct_statistics) == ({}, [], [], 3)
    assert policy == DEFAULT


def test_a_ledger_that_holds_more_than_its_policy_allows_is_a_violation(small: Settings, site: Site, tmp_path: Path) -> None:
    """Written by a client whose guard does not hold: with the rules lifted, under the same policy."""
    sent(small, site)
    ledger = Ledger(site.audit)
    opened = next(entry for entry in ledger.entries() if entry.type == "open")
    intent = next(entry for entry in ledger.entries() if isinstance(entry, Intent))
    for number in range(3):
        run = f"{number:032x}"
        ledger.append(opened.model_copy(update={"run": run}))
        arrays = [a.model_copy(update={"sha256": f"{number:064x}"}) if a.name == VECTOR else a for a in intent.arrays]
        ledger.append(intent.model_copy(update={"run": run, "message": f"{number:032x}", "arrays": arrays}))
    found = [finding.what for finding in check_ledger(site.audit).findings if finding.verdict is Verdict.VIOLATION]
    assert found == ["sent another 'seed-routing-vector' after 3 different ones, all that the policy allows"]
    (kept,) = site.audit.glob("settings-*.json")
    shutil.move(kept, tmp_path / "kept")
    assert Verdict.INCOMPLETE is worst(f for f in check_ledger(site.audit).findings if f.verdict is not Verdict.VIOLATION)
    kept.write_bytes((tmp_path / "kept").read_bytes().replace(b'"seed":0', b'"seed":1'))
    assert worst(check_ledger(site.audit).findings) is Verdict.TAMPERED


VALUES = st.recursive(st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5), st.lists, max_leaves=4)


@given(st.sampled_from(sorted(touching_names())), VALUES)
@hypothesis_settings(max_examples=300, deadline=None)
def test_no_other_value_of_any_setting_passes_the_default(name: str, value: object) -> None:
    first = Terms(touching(Settings()), "a" * 64, "b" * 64)
    asked = Terms({**first.settings, name: value}, "a" * 64, "b" * 64)
    if value == first.settings[name]:
        return
    with pytest.raises(PolicyError, match="rule settings"):
        check_terms(DEFAULT, asked, first)
    check_terms(SIMULATION, asked, first)
    assert policy_text(DEFAULT)
