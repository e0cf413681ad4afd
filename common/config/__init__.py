"""The settings of a run: frozen, strict, and complete. A preset is a TOML file of them."""

from typing import Literal

from pydantic import Field, model_validator

from metamoe.common.config.compute import DEVICE, Compute, Precision, Weights
from metamoe.common.config.data import AnswerIs, Colour, Columns, Data, ListChoices, Partition, Splits
from metamoe.common.config.method import Experts, ExpertTraining, Lora, Privacy, Proxies, Router, RouterTraining
from metamoe.common.config.section import Count, Name, NonNegative, Positive, Section
from metamoe.common.errors import ProxyCountError

__all__ = [
    "DEVICE",
    "AnswerIs",
    "Colour",
    "Columns",
    "Compute",
    "Count",
    "Data",
    "ExpertTraining",
    "ListChoices",
    "Lora",
    "Metric",
    "NonNegative",
    "Partition",
    "Positive",
    "Precision",
    "Proxies",
    "Router",
    "Section",
    "Settings",
    "Splits",
    "Weights",
]

Metric = Literal["macro-f1", "balanced-accuracy", "calibration-error", "perplexity"]


class Settings(Section):
    """Everything that decides what a run computes."""

    preset: str = Field("glyphs", description="name of the preset that the settings came from; it decides nothing")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="the one seed from which every random choice is derived")
    clients: Count = Field(3, description="number of clients (K)")
    quorum: int = Field(
        0, ge=0, description="clients with which a run goes on when others are missing, who are named; 0 is all of them"
    )
    without: tuple[Name, ...] = Field(
        (), description="names of clients that have a place and no part in the run: they have left, or are yet to join"
    )
    seed_model: str = Field(
        "glyphs", description='"glyphs" (built in), a folder, a .gguf file, package:NAME for one in a package, or a hub id'
    )
    report_accuracy: bool = Field(False, description="let clients send the accuracy they measure on the delivered model")
    metrics: tuple[Metric, ...] = Field(
        (),
        description="what tables have beside accuracy; results.json has all; of data.source = text, perplexity is always there",
    )
    data: Data = Data()
    proxies: Proxies = Proxies()
    lora: Lora = Lora()
    expert_training: ExpertTraining = ExpertTraining()
    experts: Experts = Experts()
    router: Router = Router()
    router_training: RouterTraining = RouterTraining()
    privacy: Privacy = Privacy()
    compute: Compute = Compute()

    def client_domain(self, client: int) -> str:
        """Domain of client number ``client``: the domains in turn."""
        return self.data.domains[client % len(self.data.domains)]

    @property
    def data_sources(self) -> dict[str, str]:
        """Where each set comes from, by name: a hub id with its commit, or a folder; of built-in data and of sets that only
        clients have, nothing.
        """
        data = self.data
        if data.source == "glyphs":
            return {}
        own = data.domains if data.private == "built-in" else ()
        if data.folder:
            return {"public": data.public, **{name: name for name in own}}
        return {"public": data.public_hub, **dict(zip(own, data.hub, strict=False))}

    @property
    def by_shape(self) -> bool:
        """Whether clients say their shape beside their mean, and decisions are by Gaussians."""
        had = self.router.vectors == "seed" and self.router.rows == "fisher" and self.privacy.vectors == "none"
        return self.router.statistics == "shape" or (self.router.statistics == "auto" and had)

    @property
    def least_clients(self) -> int:
        """With fewer clients than these a run ends."""
        return self.quorum or len(self.members)

    @property
    def client_names(self) -> list[str]:
        """The clients' names in order: the domain's, numbered where several clients share one."""
        count = len(self.data.domains)
        return [
            f"{self.client_domain(k)}-{k // count + 1}" if k % count + count < self.clients else self.client_domain(k)
            for k in range(self.clients)
        ]

    @property
    def members(self) -> list[int]:
        """Numbers of the clients that take part, in order. The others keep theirs, and so do these."""
        return [client for client, name in enumerate(self.client_names) if name not in self.without]

    @property
    def member_names(self) -> list[str]:
        """The names of the clients that take part, in order."""
        return [name for name in self.client_names if name not in self.without]

    @property
    def expert_names(self) -> list[str]:
        """Names of what the router chooses among, in the order of its rows: the clients, and the seed if it is one more."""
        return [*self.member_names, "seed"] if self.router.seed_expert else self.member_names

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        wanted = len(self.data.domains) if self.data.private == "built-in" else 0
        if self.data.source != "glyphs" and not self.data.folder and (len(self.data.hub) < wanted or not self.data.public_hub):
            raise ValueError(
                f"data.source = {self.data.source} needs data.folder (--data-dir), or data.public-hub and a hub id in data.hub "
                f"for each of {wanted} domains"
            )
        if self.proxies.count > self.proxies.pool:
            raise ProxyCountError(
                f"proxies.count = {self.proxies.count} is more than proxies.pool = {self.proxies.pool}; "
                "lower the one or raise the other"
            )
        if unknown := [name for name in self.without if name not in self.client_names]:
            raise ValueError(f"without names {unknown[0]!r}, but the clients are {', '.join(self.client_names)}")
        if not self.members:
            raise ValueError(f"without = {list(self.without)} leaves none of clients = {self.clients}")
        taking_part = f"clients = {self.clients}" + (f" without {', '.join(self.without)}" if self.without else "")
        if self.quorum > len(self.members):
            raise ValueError(f"quorum = {self.quorum} is more than {taking_part}")
        experts = min(self.least_clients, self.experts.max) + self.router.seed_expert
        if self.router.top_k > experts:
            few = f"quorum = {self.quorum}" if self.quorum else taking_part
            few = few if self.least_clients <= self.experts.max else f"experts.max = {self.experts.max}"
            raise ValueError(f"router.top-k = {self.router.top_k} is more than the {experts} experts of {few}")
        if self.privacy.vectors == "gaussian" and self.router.vectors == "private" and self.router.rows != "fresh":
            raise ValueError(
                "privacy.vectors = gaussian with router.vectors = private: means in an expert that was trained on the same "
                "samples move by more than any bound on one sample's share; set router.vectors = seed or proxy"
            )
        by_classifier = self.proxies.relevance == "classifier" and self.proxies.selection != "random"
        if self.proxies.relevance == "gaussian" and self.proxies.selection != "random" and not self.by_shape:
            raise ValueError(
                "proxies.relevance = gaussian needs the clients' shapes, which they do not send with these settings; set "
                "proxies.relevance = fisher, or router.statistics = shape"
            )
        if self.router.mixing == "answers" and self.data.is_text:
            raise ValueError(
                f"router.mixing = answers is for images, not for data.source = {self.data.source}; set router.mixing = layers"
            )
        if self.privacy.vectors == "gaussian" and by_classifier:
            raise ValueError(
                "privacy.vectors = gaussian with proxies.relevance = classifier: a classifier fitted to private samples is not "
                "covered; set proxies.relevance = fisher"
            )
        if self.compute.client_device == "cpu" and self.compute.gpus_per_client not in ("auto", 0):
            raise ValueError(
                f"compute.gpus-per-client = {self.compute.gpus_per_client} with compute.client-device = cpu: what a client has "
                "it should use; set client-device = auto, or gpus-per-client = auto"
            )
        if self.compute.weights == "bfloat16" and self.compute.precision == "float32":
            raise ValueError(
                "compute.weights = bfloat16 with compute.precision = float32: products of rounded weights are no better than "
                "they are; set compute.precision = bfloat16, or compute.weights = auto"
            )
        if self.privacy.expert == "dp-sgd" and self.compute.precision == "bfloat16":
            raise ValueError(
                "privacy.expert = dp-sgd with compute.precision = bfloat16: gradients rounded to 8 bits are not below the norm "
                "that they are clipped to, on which the guarantee rests; set compute.precision = float32"
            )
        if self.privacy.expert == "dp-sgd" and self.data.is_text:
            raise ValueError(f"privacy.expert = dp-sgd is for images, not for data.source = {self.data.source}")
        if self.privacy.expert == "dp-sgd" and self.expert_training.samples != "aligned":
            raise ValueError(
                f"privacy.expert = dp-sgd with expert-training.samples = {self.expert_training.samples}: it starts from the "
                "proxies and goes on with private samples; set expert-training.samples = aligned"
            )
        if self.privacy.expert == "dp-sgd" and self.expert_training.patience:
            raise ValueError(
                f"privacy.expert = dp-sgd with expert-training.patience = {self.expert_training.patience}: when training ends "
                "would tell of validation samples, which the noise does not cover; set patience = 0"
            )
        if self.privacy.expert == "dp-sgd" and self.privacy.vectors == "none" and self.proxies.selection != "random":
            raise ValueError(
                "privacy.expert = dp-sgd with privacy.vectors = none: proxies chosen by an exact mean tell of it through "
                "the expert too; set privacy.vectors = gaussian, or proxies.selection = random"
            )
        training = self.router_training.supervision
        weightless = self.router.renormalise and self.router.top_k == 1
        if weightless and training == "task" and self.router_training.train_router:
            raise ValueError(
                "router.renormalise = true with router.top-k = 1 and router-training.supervision = task: the only weight is "
                "always 1, so neither rows nor lambda get a gradient; set top-k = 2, renormalise = false, or other supervision"
            )
        by_provenance = training == "provenance" or (training == "both" and weightless)
        if self.router.learn_context and self.router.context == 1 and by_provenance and self.router_training.train_router:
            raise ValueError(
                f"router.context = 1 with router-training.supervision = {training}: at exactly 1 all tokens route alike and "
                "lambda gets no gradient from provenance; start below 1 or set router.learn-context = false"
            )
        return self
