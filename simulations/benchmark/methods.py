"""The methods that a benchmark compares, as data: each is the same stages with some switches set, and a use of what they give.

The baselines are set up as the paper does (Jiang et al. 2026, 4.1), all with the same seed, the same LoRA shape and the same
private samples. Where it is silent, learning rates and top-k are the best of a few on validation data (docs/search.md);
docs/benchmarks.md names the exceptions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from metamoe.common.config import Settings
from metamoe.common.errors import InvalidSettingError
from metamoe.common.presets import changed

Use = Literal["seed", "expert", "oracle", "ensemble", "soup", "unified", "pooled", "fedavg"]
"""How a method answers: the seed alone; one expert alone; each test set by its own domain's experts; the mean of all experts'
probabilities; one dense model with the experts' mean weights; the unified model; the same trained on all private samples in one
place; one adapter by federated averaging.
"""


@dataclass(frozen=True)
class Method:
    """A row of a benchmark's table.

    ``settings`` change the preset's, ``client`` is the number of the expert for ``use = "expert"``, ``private`` says that no
    private sample leaves a client, and ``group`` is the question an ablation answers.
    """

    name: str
    use: Use
    about: str
    settings: tuple[str, ...] = ()
    client: int = 0
    private: bool = True
    group: str = ""


_PER_LAYER = ("router.decide=per-layer", "router.evidence=layer", "router.seed-expert=false", "router.temperature=1")
# Experts as they are, with nothing decided about proxies or router.
_EXPERTS_ONLY = (
    "expert-training.samples=private",
    "proxies.selection=random",
    "router.rows=fresh",
    "router.vectors=proxy",
    "router-training.supervision=none",
)
_TWO = ("router.top-k=2", "router.renormalise=true")
_TASK = ("router-training.supervision=task", "router-training.epochs=5")
_TOKEN_ALONE = ("router.context=0", "router.learn-context=false")
# 5 epochs over random public samples. BTX trains experts and router, with the two best experts; in the mixture of LoRAs the
# experts are frozen and all take part.
_PUBLIC_ROUTER = (
    "expert-training.samples=private",
    "proxies.selection=random",
    *_PER_LAYER,
    *_TOKEN_ALONE,
    "router.rows=fresh",
    "router.vectors=proxy",
    "router-training.samples=public",
    *_TASK,
)
_PAPER = (
    "proxies.relevance=classifier",
    *_PER_LAYER,
    "router.rows=dot",
    "router.vectors=private",
    "router.context=0.3",
    "router.learn-context=true",
    *_TASK,
    "router-training.train-experts=true",
    "router-training.learning-rate=1e-3",
)
_TOP_1 = ("router.top-k=1", "router.renormalise=false")
# One stage less: what is pooled is trained on afterwards.
_POOLED = ("expert-training.samples=private", "router-training.supervision=none")


def main_methods(settings: Settings) -> list[Method]:
    """The rows of the main table."""
    names = settings.client_names
    experts = [
        Method(f"expert:{name}", "expert", f"metamoe's expert of {name} alone, on everything; it stays there", client=k)
        for k, name in enumerate(names)
    ]
    everyone = f"router.top-k={settings.clients}"
    return [
        Method("zero-shot", "seed", "the seed, untrained"),
        *experts,
        Method(
            "oracle", "oracle", "each test set by its own domain's experts, public samples by the seed: the ceiling of routing"
        ),
        Method("btm", "ensemble", "Branch-Train-Merge: the mean of all experts' probabilities", _EXPERTS_ONLY),
        Method("soup", "soup", "Model Soup: the experts' mean weights in one dense model", _EXPERTS_ONLY),
        Method(
            "btx",
            "unified",
            "Branch-Train-MiX: a fresh router in every layer, trained with the experts on random public samples, top-2",
            (*_PUBLIC_ROUTER, *_TWO, "router-training.learning-rate=1e-4", "router-training.train-experts=true"),
        ),
        Method(
            "mixture-of-loras",
            "unified",
            "frozen experts, all of them mixed by a fresh router in every layer that is trained on random public samples",
            (
                *_PUBLIC_ROUTER,
                everyone,
                "router.renormalise=true",
                "router-training.learning-rate=1e-3",
                "router-training.train-experts=false",
            ),
        ),
        Method(
            "flexolmo",
            "unified",
            "FlexOlmo: router rows are private means, trained with the experts on proxies chosen by relevance alone, top-2",
            (
                "expert-training.samples=private",
                "proxies.selection=relevance",
                *_PER_LAYER,
                *_TOKEN_ALONE,
                *_TWO,
                *_TASK,
                "router.rows=dot",
                "router.vectors=private",
                "router-training.train-experts=true",
                "router-training.learning-rate=1e-4",
            ),
        ),
        Method("fedavg", "fedavg", "federated averaging of one LoRA adapter over rounds, by Flower's own aggregation"),
        Method(
            "metamoe-paper",
            "unified",
            "the paper's method: trained classifier, Eq. 6, task loss, every layer decides",
            (*_PAPER, *_TOP_1),
        ),
        Method(
            "metamoe-released",
            "unified",
            "the paper's released code: the one weight is renormalised to 1, so router and lambda never learn",
            (
                *_PAPER,
                "router.top-k=1",
                "router.renormalise=true",
                "router-training.train-router=false",
                "router-training.learning-rate=1e-4",
            ),
        ),
        Method(
            "unrestricted-moe", "pooled", "the same model, trained on all private samples in one place", _POOLED, private=False
        ),
        Method("metamoe", "unified", "this product's method, as the preset sets it"),
    ]


# Public classes that show what a domain shows, or letters of its script.
_NEAR = (
    *("DIGIT", "NUMBER", "NUMERAL", "FRACTION", "SUPERSCRIPT", "SUBSCRIPT", "CIRCLED", "MATHEMATICAL", "GREEK", "COPTIC"),
    *("ARROW", "ARROWS", "ARROWHEAD", "HARPOON", "HARPOONS", "CYRILLIC", "OPERATOR", "SIGN", "SYMBOL"),
)
_FAR = (f"data.public-without={list(_NEAR)}",)

# Each client by its mean alone: Fisher rows, lambda and the router trained by task loss.
_MEANS = (
    "router.statistics=mean",
    "router.temperature=1",
    "router.context=0.97",
    "router.learn-context=true",
    "router-training.supervision=task",
)
_TRAINED = ("router-training.supervision=task",)
# The embedding is half as wide as what is looked at else, so that whole covariances weigh less.
_EMBEDDING = ("router.decide=embedding", "router.shape-rank=0")
_ABLATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "proxies": {
        "by relevance alone": ("proxies.selection=relevance",),
        "random": ("proxies.selection=random",),
    },
    "relevance": {
        "trained classifier": ("proxies.relevance=classifier",),
        "Gaussians": ("proxies.relevance=gaussian",),
        "Gaussians, by relevance alone": ("proxies.relevance=gaussian", "proxies.selection=relevance"),
    },
    "sizes": {
        f"m = {count}, n = {pool}": (f"proxies.count={count}", f"proxies.pool={pool}")
        for count in (50, 200, 400)
        for pool in (500, 2_000, 8_000)
    },
    "context": {
        "means, lambda = 0": (*_MEANS, "router.context=0", "router.learn-context=false"),
        "means, lambda from 0.3": (*_MEANS, "router.context=0.3"),
        "means, lambda = 1": (*_MEANS, "router.context=1", "router.learn-context=false"),
    },
    "rows": {"dot products": (*_MEANS, "router.rows=dot"), "fresh": (*_MEANS, "router.rows=fresh")},
    "decision": {
        "means, every layer": (*_MEANS, "router.decide=per-layer", "router.evidence=layer", "router.vectors=private"),
        "once, its own layer alone": ("router.evidence=layer",),
    },
    "layer": {
        "decided at 0": ("lora.first-layer=0",),
        "decided at 2": ("lora.first-layer=2",),
        "decided at 3": ("lora.first-layer=3",),
    },
    "seed-expert": {"without": ("router.seed-expert=false",), "prior log-odds 0": ("router.seed-log-odds=0",)},
    "aligned": {
        "private samples alone": ("expert-training.samples=private",),
        "proxies alone": ("expert-training.samples=proxies",),
    },
    "vectors": {
        "private, in the experts": (*_MEANS, "router.vectors=private"),
        "proxies' means, without seed": (*_MEANS, "router.vectors=proxy", "router.seed-expert=false"),
        "proxies' plain means, without seed": (
            *_MEANS,
            "router.vectors=proxy",
            "router.proxy-weights=equal",
            "router.seed-expert=false",
        ),
        "means of proxies by relevance alone, without seed": (
            *_MEANS,
            "router.vectors=proxy",
            "proxies.selection=relevance",
            "router.seed-expert=false",
        ),
        "means of random proxies, without seed": (
            *_MEANS,
            "router.vectors=proxy",
            "proxies.selection=random",
            "router.seed-expert=false",
        ),
    },
    "supervision": {
        "task": _TRAINED,
        "provenance": ("router-training.supervision=provenance",),
        "both": ("router-training.supervision=both",),
    },
    "statistics": {"means": _MEANS},
    "shape-rank": {"32": ("router.shape-rank=32",), "whole covariances": ("router.shape-rank=0",)},
    "mixing": {"answers": ("router.mixing=answers",)},
    "embedding": {
        "mixed in layers": _EMBEDDING,
        "answers mixed": (*_EMBEDDING, "router.mixing=answers"),
    },
    "top-k": {
        "top-1, Eq. 6": _TOP_1,
        "top-2, Eq. 6": ("router.renormalise=false",),
        "top-3": ("router.top-k=3",),
    },
    "temperature": {"1": ("router.temperature=1",), "100": ("router.temperature=100",)},
    "experts": {"at most 3": ("experts.max=3",)},
    "stage-3": {"experts co-trained": (*_TRAINED, "router-training.train-experts=true")},
    "privacy": {
        "vectors at epsilon 1": (*_MEANS, "privacy.vectors=gaussian", "privacy.epsilon=1"),
        "vectors at epsilon 2": (*_MEANS, "privacy.vectors=gaussian", "privacy.epsilon=2"),
        "vectors at epsilon 4": (*_MEANS, "privacy.vectors=gaussian", "privacy.epsilon=4"),
        "vectors at epsilon 8": (*_MEANS, "privacy.vectors=gaussian", "privacy.epsilon=8"),
        **{
            f"vectors and shapes at epsilon {e}": (
                "router.statistics=shape",
                "privacy.vectors=gaussian",
                f"privacy.epsilon={e}",
            )
            for e in (1, 2, 4, 8)
        },
    },
    "dp-sgd": {
        "experts at epsilon 8": (*_MEANS, "privacy.vectors=gaussian", "privacy.expert=dp-sgd", "privacy.expert-epsilon=8"),
        "experts at epsilon 3": (*_MEANS, "privacy.vectors=gaussian", "privacy.expert=dp-sgd", "privacy.expert-epsilon=3"),
        "experts from proxies alone": (*_MEANS, "privacy.vectors=gaussian", "expert-training.samples=proxies"),
    },
    "public-set": {"nothing near the domains": _FAR},
}
_IN_CONTEXT = ("router.context=0.97", "router.learn-context=true")
# Changes of other methods: what the paper's own ablations take away, and what of metamoe others could have too.
_OF_OTHERS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "public-set": {"flexolmo, nothing near the domains": ("flexolmo", _FAR)},
    "paper": {
        "without DPP": ("metamoe-paper", ("proxies.selection=relevance",)),
        "without context": ("metamoe-paper", _TOKEN_ALONE),
        "without aligned training": ("metamoe-paper", ("expert-training.samples=private",)),
        "lambda from 0.97": ("metamoe-paper", _IN_CONTEXT),
        "top-2": ("metamoe-paper", _TWO),
        "Fisher rows": ("metamoe-paper", ("router.rows=fisher",)),
        "Fisher rows, lambda from 0.97": ("metamoe-paper", ("router.rows=fisher", *_IN_CONTEXT)),
    },
    "baselines": {
        "btx in context": ("btx", _IN_CONTEXT),
        "flexolmo in context": ("flexolmo", _IN_CONTEXT),
        "flexolmo with the seed as expert": ("flexolmo", ("router.seed-expert=true",)),
        "flexolmo in context, with the seed as expert": ("flexolmo", (*_IN_CONTEXT, "router.seed-expert=true")),
    },
}
_OTHER_USES = (
    Method("merging: btm of aligned experts", "ensemble", "Branch-Train-Merge of metamoe's own experts", group="merging"),
    Method("merging: soup of aligned experts", "soup", "Model Soup of metamoe's own experts", group="merging"),
)


def ablations(settings: Settings) -> list[Method]:
    """All ablations: metamoe with other switches, one question a group; without those that change nothing of these settings."""
    switched = [
        Method(f"{group}: {name}", "unified", "metamoe with " + ", ".join(switches), switches, group=group)
        for group, members in _ABLATIONS.items()
        for name, switches in members.items()
    ]
    others = {method.name: method.settings for method in main_methods(settings)}
    of_others = [
        Method(f"{group}: {name}", "unified", f"{other} with {', '.join(switches)}", (*others[other], *switches), group=group)
        for group, members in _OF_OTHERS.items()
        for name, (other, switches) in members.items()
    ]
    return [method for method in (*switched, *of_others, *_OTHER_USES) if not method.settings or _changes(settings, method)]


def _changes(settings: Settings, method: Method) -> bool:
    try:
        switched = changed(settings, method.settings)
    except InvalidSettingError:
        # It does not go with these settings, which is said when it is to be run.
        return True
    return _effective(switched) != _effective(settings)


def _effective(settings: Settings) -> Settings:
    """Room for more experts than there are clients is room for as many."""
    return changed(settings, [f"experts.max={min(settings.experts.max, settings.clients)}"])


def chosen(settings: Settings, methods: Sequence[str], groups: Sequence[str]) -> list[Method]:
    """The methods of these names and the ablations of these groups; ``"all"`` is all of them.

    Raises:
        InvalidSettingError: there is no such method or group; lists those there are.
    """
    main, extra = main_methods(settings), ablations(settings)
    _check("method", methods, [method.name for method in main])
    _check("ablation", groups, list(dict.fromkeys(method.group for method in extra)))
    return [
        *(method for method in main if method.name in methods or "all" in methods),
        *(method for method in extra if method.group in groups or "all" in groups),
    ]


def _check(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name != "all" and name not in known:
            raise InvalidSettingError(f"unknown {kind} {name!r}; there are all, {', '.join(known)}")
