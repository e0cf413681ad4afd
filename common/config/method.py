"""Settings of the method: its three stages, and what of them is private by noise."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, model_validator

from metamoe.common.config.section import Count, Fraction, NonNegative, Positive, Section

Optimizer = Annotated[Literal["adamw", "sgd"], Field(description="sgd: with momentum 0.9")]


class Proxies(Section):
    """Stage 1: how public samples are chosen for each client."""

    count: Count = Field(200, description="proxies for each client (m)")
    pool: Count = Field(2_000, description="candidates: the public samples with the largest relevance (n)")
    candidates: Literal["pool", "all"] = Field(
        "pool", description="all: the DPP picks out of the whole public set; the pool is then only what relevance sums to"
    )
    relevance: Literal["fisher", "gaussian", "classifier"] = Field(
        "fisher",
        description="fisher: from the client's seed routing vector; gaussian: from its mean and shape, by which the router "
        "decides too; classifier: trained and sent by the client (the paper's)",
    )
    selection: Literal["dpp", "relevance", "random"] = Field(
        "dpp", description="dpp: relevant and diverse; relevance: the m most relevant; random: any, and no client is asked"
    )


class Lora(Section):
    """The shape of an expert: low-rank matrices on the feed-forward sublayers."""

    rank: Count = Field(16, description="inner dimension r of each pair of matrices")
    alpha: Count = Field(32, description="what they add is multiplied by alpha / rank")
    first_layer: int = Field(0, ge=0, description="layers below it stay the seed's; 0 adapts all of them")


class ExpertTraining(Section):
    """Stage 2: on the private samples together with the proxies."""

    samples: Literal["aligned", "private", "proxies"] = Field(
        "aligned", description="aligned: private samples and proxies together; private, proxies: one of them alone"
    )
    epochs: Count = Field(10, description="passes over the samples")
    batch_size: Count = Field(64, description="samples of a step")
    learning_rate: Positive = Field(1e-3, description="after warm-up")
    weight_decay: NonNegative = Field(0.0, description="of the optimizer")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises to its value")
    optimizer: Optimizer = "adamw"
    schedule: Literal["linear", "constant"] = Field("linear", description="after warm-up: falling to zero, or constant")
    evaluate_every: int = Field(
        0,
        ge=0,
        description="epochs between two looks at the client's own validation samples, shown to the client alone; 0 is none",
    )
    patience: int = Field(
        0,
        ge=0,
        description="looks at the validation samples without a smaller loss after which training ends, with what had the "
        "smallest; 0 is never",
    )
    checkpoint_minutes: NonNegative = Field(
        5.0,
        description="between two states of a training on disk, from which a stopped one goes on, beside that of every epoch; 0 "
        "is none within an epoch",
    )

    @model_validator(mode="after")
    def _check(self) -> "ExpertTraining":
        if self.patience and not self.evaluate_every:
            raise ValueError(
                f"expert-training.patience = {self.patience} goes by validation; set expert-training.evaluate-every, as to 1"
            )
        return self


class Experts(Section):
    """Stage 3: how many experts the unified model has, however many clients there are."""

    max: Count = Field(
        32, description="experts of the unified model; of more clients, those whose Gaussians or means are nearest are merged"
    )


class Router(Section):
    """The context-aware router and how it decides."""

    decide: Literal["once", "per-layer", "embedding"] = Field(
        "once",
        description="once: at the lowest layer with experts, held for those above; per-layer: the paper's; embedding: on the "
        "seed's, for which it runs once without experts first",
    )
    evidence: Literal["prefix", "layer"] = Field(
        "prefix", description="what a decision looks at: the FFN inputs of all layers up to its own, or of its own alone"
    )
    rows: Literal["fisher", "dot", "fresh"] = Field(
        "fisher", description="Fisher rows with a bias, the routing vectors themselves, or random rows"
    )
    vectors: Literal["seed", "private", "proxy"] = Field(
        "seed",
        description="seed: a client's private mean in the frozen seed; private: the mean of what trained its expert, in the "
        "expert (the paper's); proxy: the mean of its proxies in its expert, for which it sends nothing",
    )
    statistics: Literal["auto", "mean", "shape"] = Field(
        "auto",
        description="what a client says of its samples: their mean, or also their shape, a covariance in coordinates in which "
        "the public set is white, for scores that are Gaussian log-likelihoods in place of Fisher's linear ones; auto: shape "
        "where it is worth its while, with vectors = seed, rows = fisher and privacy.vectors = none",
    )
    shape_rank: int = Field(
        64, ge=0, description="principal directions of a shape, and one variance for all others; 0 is the whole covariance"
    )
    shape_pooled: Fraction = Field(0.5, description="share of all clients' mean covariance in each one's")
    shape_identity: Fraction = Field(0.02, description="share of the public covariance in each one's, after that")
    proxy_weights: Literal["relevance", "equal"] = Field(
        "relevance", description="weights of the proxies in their mean, for vectors = proxy"
    )
    seed_expert: bool = Field(
        True, description="the seed itself as one more expert, with the public mean as its routing vector"
    )
    seed_log_odds: FiniteFloat | Literal["auto"] = Field(
        "auto",
        description="prior log-odds of the seed against an expert; auto: with shapes those at which 98% of public samples stay "
        "with the seed, or less, so that each client keeps 80% of what its Gaussian draws; else -8, for domains far from the "
        "public samples",
    )
    temperature: Positive = Field(
        10.0,
        description="divides the experts' scores among themselves, not against the seed's: above 1, experts that know much the "
        "same share a sample more evenly",
    )
    top_k: Count = Field(2, description="experts that compute each token (k)")
    mixing: Literal["layers", "answers"] = Field(
        "layers",
        description="layers: the chosen experts are mixed in every layer, in one pass; answers: each runs alone, and their "
        "probabilities are averaged, in as many passes",
    )
    renormalise: bool = Field(True, description="weights of the chosen experts sum to one; false is the paper's Eq. 6")
    context: Fraction = Field(1.0, description="initial lambda: 0 looks at the token alone, 1 at the sequence alone")
    learn_context: bool = Field(False, description="train lambda too")

    @model_validator(mode="after")
    def _check(self) -> "Router":
        if self.decide == "per-layer" and self.evidence == "prefix":
            raise ValueError("router.evidence = prefix needs router.decide = once; set evidence = layer")
        if self.decide == "per-layer" and self.vectors == "seed":
            raise ValueError(
                "router.vectors = seed needs router.decide = once: above the lowest layer, states are the experts'"
            )
        if self.decide == "embedding" and self.vectors != "seed":
            raise ValueError(
                f"router.decide = embedding with router.vectors = {self.vectors}: the embedding is the seed's, and so must "
                "means of it be; set router.vectors = seed"
            )
        if self.statistics == "shape" and (self.vectors != "seed" or self.rows != "fisher"):
            raise ValueError(
                f"router.statistics = shape with router.vectors = {self.vectors} and router.rows = {self.rows}: a shape is of "
                "what the seed makes of private samples, beside their mean; set vectors = seed and rows = fisher"
            )
        if self.mixing == "answers" and (self.decide == "per-layer" or self.context != 1 or self.learn_context):
            raise ValueError(
                "router.mixing = answers needs one decision a sample: set router.decide = once or embedding, "
                "router.context = 1 and router.learn-context = false"
            )
        return self


class RouterTraining(Section):
    """Stage 3: on the union of the proxies; with a seed expert, also on as many random public samples as one client has
    proxies.
    """

    samples: Literal["proxies", "public"] = Field(
        "proxies", description="public: random public samples, as many as all proxies"
    )
    supervision: Literal["task", "provenance", "both", "none"] = Field(
        "none", description="task loss, each proxy's known client, their sum, or no training at all"
    )
    epochs: Count = Field(3, description="passes over the samples")
    batch_size: Count = Field(64, description="samples of a step")
    learning_rate: Positive = Field(1e-4, description="of rows, biases and, where they are trained, experts")
    context_learning_rate: Positive = Field(1e-3, description="of lambda")
    optimizer: Optimizer = "adamw"
    train_router: bool = Field(True, description="train the router: rows, biases, lambda")
    train_experts: bool = Field(False, description="train the experts too; frozen ones can be taken out of the model again")

    @model_validator(mode="after")
    def _check(self) -> "RouterTraining":
        if self.supervision != "none" and not (self.train_router or self.train_experts):
            raise ValueError("router-training trains neither router nor experts; set router-training.supervision = none")
        if self.supervision == "provenance" and not self.train_router:
            raise ValueError("router-training.supervision = provenance trains the router alone; set train-router = true")
        if self.samples == "public" and self.supervision in ("provenance", "both"):
            raise ValueError(
                f"router-training.samples = public with supervision = {self.supervision}: random public samples are no client's"
            )
        return self


class Privacy(Section):
    """Differential privacy of what a client sends, for one record of it; see docs/privacy.md for what is covered."""

    vectors: Literal["none", "gaussian"] = Field(
        "none",
        description="gaussian: the means of stage 1 leave once, clipped and with noise, and so all that follows from them",
    )
    epsilon: Positive = Field(4.0, description="of the means of stage 1, for vectors = gaussian")
    delta: Annotated[float, Field(gt=0, lt=1, description="of the means of stage 1, for vectors = gaussian")] = 1e-5
    clip: Positive = Field(2.0, description="largest norm of a sample's features, where a public one's has 1 on average")
    min_samples: Count = Field(
        500, description="known to all: no client has fewer training samples; noise goes by it, and so does not tell how many"
    )
    expert: Literal["none", "dp-sgd"] = Field(
        "none", description="dp-sgd: trained on the proxies first, and then on private samples with clipped, noisy gradients"
    )
    expert_epsilon: Positive = Field(8.0, description="of the expert, for expert = dp-sgd")
    expert_delta: Annotated[float, Field(gt=0, lt=1, description="of the expert, for expert = dp-sgd")] = 1e-5
    expert_clip: Positive = Field(1.0, description="largest norm of one sample's gradient")
    expert_epochs: Count = Field(10, description="how often each private sample is expected to be taken")
    expert_batch_size: Count = Field(250, description="samples of a step, of every min-samples that a client has")
    expert_learning_rate: Positive = Field(8e-3, description="of the steps with noise")
