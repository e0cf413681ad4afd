"""A policy's rules: what a run may send, and what a server may ask over all runs. Checks yield (verdict, what is wrong)."""

import math
from collections import Counter
from statistics import NormalDist

from form import parsed, sha

FINE, VIOLATION, TAMPERED, INCOMPLETE, OVER_BUDGET = 0, 1, 3, 5, 6
WORST_FIRST = (TAMPERED, VIOLATION, OVER_BUDGET, INCOMPLETE)
MEANING = {FINE: "fine", VIOLATION: "violation of the policy", TAMPERED: "tampered with", INCOMPLETE: "incomplete"}
MEANING[OVER_BUDGET] = "budget exceeded"
WORDS = {
    "client": "the client's number; nothing about the data",
    "seed-routing-vector": "a mean over all private training samples: what they are, to some degree the mix of their classes",
    "seed-ffn-inputs": "means over all private training samples, one for each layer looked at; as the routing vector",
    "seed-shape": "how the private training samples scatter about their mean",
    "relevance-classifier": "a classifier fitted to single private samples; more than a mean",
    "routing-vectors": "means in the trained expert; with a guess of the amount of data, the private mean",
    "expert": "matrices trained on the private samples: what they are, and to some degree whether a given one was among them",
    "accuracy": "how well the delivered model does on the private test samples",
    "ledger": "public key, Merkle root and signature of this ledger; nothing about the data",
}
OF_NO_SAMPLE = ("client", "ledger")


def kind_of(name):
    """The kind of artifact that an array is part of, by its name; None if there is none."""
    if name in ("audit-key", "ledger-root", "ledger-signature"):
        return "ledger"
    if name.endswith((".lora_A.weight", ".lora_B.weight")):
        return "expert"
    return name if name in WORDS and name not in ("expert", "ledger") else None


def check_policy(policy, intents):
    """What one run sent: only what is allowed, as often and as much, and with differential privacy where that is asked."""
    released, total = Counter(), 0
    for intent in intents:
        covered = {name for spent in intent["spent"] for name in spent["covers"]}
        total += sum(array["bytes"] for array in intent["arrays"])
        for array in intent["arrays"]:
            kind = kind_of(array["name"])
            if kind is None:
                yield VIOLATION, f"sent {array['name']!r}, which is no artifact"
            elif policy["allow"].get(kind, {}).get("private") and array["name"] not in covered:
                yield VIOLATION, f"sent {array['name']!r} without the differential privacy it needs"
        released.update({kind_of(array["name"]) for array in intent["arrays"]} - {None})
    for kind, count in released.items():
        rule = policy["allow"].get(kind)
        if rule is None:
            yield VIOLATION, f"sent {kind!r}, which the policy does not allow"
        elif count > rule.get("releases-per-run", 1) * (2 if kind == "ledger" else 1):
            yield VIOLATION, f"sent {kind!r} {count} times"
    if total > policy.get("limits", {}).get("max-bytes-per-run", 256_000_000):
        yield VIOLATION, f"sent {total:,} bytes, more than the policy allows"


FREE = {
    *("preset", "quorum", "without", "data.workers", "proxies.pool", "proxies.candidates"),
    "expert-training.checkpoint-minutes",
    *("experts.max", "router.proxy-weights", "router.seed-expert", "router.seed-log-odds", "router.temperature"),
    *("router.top-k", "router.renormalise", "router.context", "router.learn-context"),
}
FREE_GROUPS, NOT_FREE = ("router-training", "compute"), ("compute.precision", "compute.micro-batch-size")


def touching(values, group=""):
    """The settings on which what a client sends depends, by name: all but the server's own."""
    found = {}
    for key, value in values.items():
        name = group + key
        if isinstance(value, dict):
            found |= touching(value, f"{name}.")
        elif name not in FREE and (group[:-1] not in FREE_GROUPS or name in NOT_FREE):
            found[name] = value
    return found


def settings_of(files, opened):
    """A run's settings; None if they are not here. ValueError if they are not those that the ledger names."""
    content = files.get(f"settings-{opened['settings']}.json")
    if content is None:
        return None
    if sha(content) != opened["settings"]:
        raise ValueError("its settings were changed")
    if not isinstance(values := parsed(content), dict):
        raise ValueError("its settings are none")
    return touching(values)


def check_terms(files, entries, policies):
    """What servers asked, run by run, against what the policy lets them choose."""
    opened = {entry["run"]: entry for entry in entries if entry["type"] == "open"}
    intents = [entry for entry in entries if entry["type"] == "intent"]
    answered, telling = dict.fromkeys(e["run"] for e in intents), {e["run"] for e in intents if statistics_of(e, True)}
    try:
        kept = {run: settings_of(files, opened[run]) for run in answered if run in opened}
    except ValueError as error:
        yield TAMPERED, str(error)
        return
    first = next(((values, opened[run]) for run, values in kept.items() if values is not None), None)
    for entry in (entry for entry in entries if entry["type"] == "open" and entry["run"] in answered):
        policy = policies.get(entry["policy"])
        if entry["role"] != "client" or not policy or "settings" not in policy:
            continue
        where, idle = f"run {entry['run'][:8]}", entry["run"] not in telling
        if (settings := kept[entry["run"]]) is None:
            yield INCOMPLETE, f"{where} was answered, but its settings are not here"
            continue
        before, of_first = first
        for rule, name in (("seed-models", "seed_model"), ("public-sets", "public_set")):
            allowed = policy.get(rule, [])
            if allowed != "any" and entry[name] not in (allowed or [of_first[name]]):
                yield VIOLATION, f"{where} was answered, but its {rule[:-1]} is none that the policy allows"
        if policy["settings"] == "any":
            continue
        for name, value in settings.items():
            rule, known = policy["settings"].get(name), before.get(name, value)
            if not (known == value or (idle and more_places(name, known, value)) if rule is None else within(rule, value)):
                yield VIOLATION, f"{where} was answered, but {name} = {value!r} is not the server's to choose"


def within(rule, value):
    if isinstance(rule, list):
        return any(type(choice) is type(value) and choice == value for choice in rule)
    return rule == "any" or (type(value) in (int, float) and rule.get("min", -math.inf) <= value <= rule.get("max", math.inf))


def more_places(name, before, value):
    """Others have places beside those of the first run: that is nothing to a client that says nothing of its samples."""
    form = {"clients": int, "data.domains": list, "data.hub": list}.get(name)
    return type(before) is type(value) is form and (value > before if form is int else value[: len(before)] == before)


def statistics_of(intent, noise_counts):
    """What of each kind of artifact a message says of private samples: the same arrays are the same statistic."""
    covered = set() if noise_counts else {name for spent in intent["spent"] for name in spent["covers"]}
    kinds = {}
    for array in intent["arrays"]:
        if (kind := kind_of(array["name"])) and kind not in OF_NO_SAMPLE and array["name"] not in covered:
            kinds.setdefault(kind, []).append(array)
    return {
        kind: intent["message"]
        if sum(math.prod(array["shape"]) for array in arrays) == 1
        else frozenset((array["name"], array["sha256"]) for array in arrays)
        for kind, arrays in kinds.items()
    }


def check_statistics(entries, policies):
    """How many different statistics of each kind had left after each message."""
    of_run = {entry["run"]: policies.get(entry["policy"]) for entry in entries if entry["type"] == "open"}
    seen = {True: {}, False: {}}
    for intent in (entry for entry in entries if entry["type"] == "intent"):
        policy = of_run.get(intent["run"]) or {}
        most = policy.get("limits", {}).get("max-distinct-statistics", 0)
        for noise_counts, before in seen.items():
            for kind, identity in statistics_of(intent, noise_counts).items():
                known = before.setdefault(kind, set())
                if noise_counts is ("budget" not in policy) and 0 < most <= len(known) and identity not in known:
                    yield VIOLATION, f"run {intent['run'][:8]} sent another {kind!r} after {len(known)} different ones"
                known.add(identity)


def check_budget(entries, policies):
    """All differential privacy that was spent, against the budget of the last policy."""
    last = [policies[entry["policy"]] for entry in entries if entry["type"] == "open" and entry["policy"] in policies]
    if not last or not (budget := last[-1].get("budget")):
        return
    spent = [each for entry in entries if entry["type"] == "intent" for each in entry["spent"]]
    if all(each["sampling_rate"] == 1 for each in spent):
        total = epsilon_of(spent, budget["delta"])
        if total > budget["epsilon"]:
            yield OVER_BUDGET, f"spent epsilon {total:.2f} at delta {budget['delta']:g}; allowed is {budget['epsilon']:g}"
    # Sampled steps need an accountant. That the sums are within the budget is enough; that they are not is no proof.
    elif sum(each["epsilon"] for each in spent) > budget["epsilon"] or sum(each["delta"] for each in spent) > budget["delta"]:
        yield INCOMPLETE, "whether the budget was kept cannot be told here: use metamoe audit budget"


def epsilon_of(spent, delta):
    """Gaussian mechanisms together are one whose 1 / sigma^2 is their sum (Dong, Roth, Su 2022; Balle and Wang 2018)."""
    mu = math.sqrt(sum(each["steps"] / each["noise_multiplier"] ** 2 for each in spent))
    phi = NormalDist().cdf

    def excess(epsilon):
        far = phi(-mu / 2 - epsilon / mu)
        return phi(mu / 2 - epsilon / mu) - (math.exp(epsilon + math.log(far)) if far else 0.0) - delta

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > 0 and high < 700:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high
