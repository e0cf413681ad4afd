"""The settings of a run: frozen, strict, and complete. A preset is a TOML file of them."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from metamoe.common.errors import ProxyCountError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, lt=1)]
Colour = Annotated[str, Field(pattern=r"^(white|black|#[0-9a-fA-F]{6})$")]
Optimizer = Annotated[Literal["adamw", "sgd"], Field(description="sgd: with momentum 0.9")]
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
Device = Annotated[str, Field(pattern=DEVICE, description="auto: a GPU where there is one, or else the CPU")]

Precision = Literal["float32", "bfloat16"]
Weights = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """A group of settings; in files and on the command line their names are in kebab case."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
    )


ListChoices = Literal["always", "where-needed"]


class Splits(Section):
    """The parts of a data set: by their names, or by fractions where a set has not been divided."""

    train: str = Field("", description="name of the part that trains; empty: train or training")
    validation: str = Field("", description="of the part for validation; empty: validation, valid, val or dev")
    test: str = Field("", description="of the part for tests; empty: test or testing")
    validation_fraction: Share = Field(0.1, description="of what trains, for validation, where there is no such part")
    test_fraction: Share = Field(0.2, description="of the whole, for tests, where there is no part to test on")


Metric = Literal["macro-f1", "balanced-accuracy", "calibration-error", "perplexity"]
AnswerIs = Literal["index", "one-based", "letter", "text", "boolean"]


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Columns(Section):
    """Which column of a set of questions is what, where it is none of the layouts that are known. A dot leads into a column
    that holds others (choices.text). Sets without the column of the question are taken for what they look like.
    """

    question: str = Field("", description="what is asked; empty: all sets are taken for what they look like")
    context: str = Field("", description="what comes before the question")
    choices: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(
        (), description="one column with a list of choices, or one for each; none: the answer is a text"
    )
    labels: str = Field("", description="the choices' own names, by which the answer goes")
    answer: str = Field("", description="which choice is right, or, without choices, what is answered")
    answer_is: Literal["auto", AnswerIs] = Field(
        "auto", description="one-based: a number from 1; auto: a label, a number from 0, a letter or the text of a choice"
    )

    @model_validator(mode="after")
    def _check(self) -> "Columns":
        if self.question and not self.answer:
            raise ValueError(f"data.columns.question = {self.question!r} needs data.columns.answer too")
        return self


class Data(Section):
    """Where the public set and the private domains come from."""

    source: Literal["glyphs", "images", "questions", "text"] = Field(
        "glyphs",
        description="glyphs: built in; the others from data.folder, or else from the hub. questions: with choices, and "
        "instructions, which a public set is made of; text: instructions, conversations and documents",
    )
    private: Literal["built-in", "own"] = Field(
        "built-in", description="built-in: a domain of the source for each client; own: each client's folder, data-dir"
    )
    folder: str = Field(
        "", description="where the domains and the public set lie, a folder each; empty: on the hub (not for source = glyphs)"
    )
    public: str = Field("public", description="name of the public set in data.folder")
    hub: tuple[str, ...] = Field((), description="hub ids of the domains, in their order")
    public_hub: str = Field("", description="hub id of the public set")
    domains: tuple[Name, ...] = Field(
        ("digits", "greek", "arrows"), min_length=1, description="of the source; with private = own any names, one a client"
    )
    classes: tuple[str, ...] = Field(
        (), description="names of the classes of the clients' own data, as far as they are not public; known to all"
    )
    dirichlet: Positive = Field(1.0, description="concentration of the class mix when several clients share a domain")
    public_samples: int = Field(0, ge=0, description="size of a random part of the public set to use; 0 is all of it")
    private_samples: int = Field(0, ge=0, description="largest number of training samples of a client; 0 is no limit")
    test_samples: int = Field(0, ge=0, description="largest number of samples that a set is evaluated on; 0 is no limit")
    public_without: tuple[str, ...] = Field(
        (), description="words: public training samples of classes with one of them in their name are left out"
    )
    evaluate_on: Literal["test", "validation"] = Field(
        "test", description="validation: for choosing settings; the public samples are then training ones"
    )
    test_corruptions: tuple[Literal["blur", "noise", "inversion"], ...] = Field(
        (), description="evaluate on images changed in each of these ways, in place of the images as they are"
    )
    workers: int = Field(
        0, ge=0, description="processes beside each one that decode images, so that a GPU need not wait; 0 is none"
    )
    background: Colour = Field("white", description="what is seen through transparent pictures: white, black or #rrggbb")
    image_column: str = Field("", description="of a table or a hub set, with pictures or their paths; empty: the usual names")
    label_column: str = Field(
        "", description="of a table or a hub set, with the classes, such as fine_label; empty: the usual names"
    )
    splits: Splits = Splits()
    columns: Columns = Columns()
    prompt: str = Field("{}", description="the text a class name is put into; {} is the name")
    list_choices: ListChoices = Field(
        "always",
        description="in a question's prompt; where-needed: only if one of them speaks of the others (none of the above), from "
        "which very small models learn more",
    )
    block_words: Count = Field(64, description="of a document: each block of it is learned after the one before it")
    prompt_tokens: Count = Field(192, description="of a prompt, at most; the end is kept")
    answer_tokens: Count = Field(32, description="of an answer, at most; the beginning is kept")

    @property
    def is_text(self) -> bool:
        """Whether it is for a decoder."""
        return self.source in ("questions", "text")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains names one twice: {list(self.domains)}")
        if self.classes and self.private == "built-in":
            raise ValueError("data.classes is for data.private = own; built-in domains have their classes")
        if self.source == "glyphs" and self.folder:
            raise ValueError(f"data.folder = {self.folder!r} with data.source = glyphs, which is built in; set source = images")
        if self.source != "glyphs" and self.test_corruptions:
            raise ValueError(f"data.test-corruptions is for data.source = glyphs, not {self.source}")
        if self.is_text and self.public_without:
            raise ValueError(f"data.public-without goes by class names, and data.source = {self.source} has none")
        if "{}" not in self.prompt:
            raise ValueError(f"prompt = {self.prompt!r} has no {{}} for the class name")
        return self


class Proxies(Section):
    """Stage 1: how public samples are chosen for each client."""

    count: Count = Field(200, description="proxies for each client (m)")
    pool: Count = Field(2_000, description="candidates: the public samples with the largest relevance (n)")
    candidates: Literal["pool", "all"] = Field(
        "pool", description="all: the DPP picks out of the whole public set; the pool is then only what relevance sums to"
    )
    relevance: Literal["fisher", "classifier"] = Field(
        "fisher",
        description="fisher: from the client's seed routing vector; classifier: trained and sent by the client (the paper's)",
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
        32, description="experts of the unified model; of more clients, those with the nearest routing vectors are merged"
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
    statistics: Literal["mean", "shape"] = Field(
        "mean",
        description="what a client says of its samples: their mean, or also their shape, a covariance in coordinates in which "
        "the public set is white, for scores that are Gaussian log-likelihoods in place of Fisher's linear ones",
    )
    shape_rank: int = Field(
        0, ge=0, description="principal directions of a shape, and one variance for all others; 0 is the whole covariance"
    )
    shape_pooled: Fraction = Field(0.5, description="share of all clients' mean covariance in each one's")
    shape_identity: Fraction = Field(0.02, description="share of the public covariance in each one's, after that")
    proxy_weights: Literal["relevance", "equal"] = Field(
        "relevance", description="weights of the proxies in their mean, for vectors = proxy"
    )
    seed_expert: bool = Field(
        True, description="the seed itself as one more expert, with the public mean as its routing vector"
    )
    seed_log_odds: float = Field(
        -8.0,
        allow_inf_nan=False,
        description="prior log-odds of the seed against an expert, for Fisher rows: 0 where domains look like public samples; "
        "15 for statistics = shape, whose experts are surer of themselves",
    )
    temperature: Positive = Field(
        1.0,
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
    context: Fraction = Field(0.97, description="initial lambda: 0 looks at the token alone, 1 at the sequence alone")
    learn_context: bool = Field(True, description="train lambda too")

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
        "task", description="task loss, each proxy's known client, their sum, or no training at all"
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


class Compute(Section):
    """What the run may use. Thread counts are fixed because sums in another order give other last digits."""

    client_threads: Count = Field(1, description="of torch and BLAS, for each client")
    server_threads: Count = Field(2, description="of torch and BLAS, at the server")
    client_device: Device = "auto"
    server_device: Device = "auto"
    precision: Precision = Field(
        "float32", description="bfloat16: matrix products in it (autocast), for GPUs; LoRA, router and sums stay float32"
    )
    weights: Weights = Field(
        "auto",
        description="how the frozen seed is held in memory: auto is as it is stored on a GPU with precision = bfloat16, and "
        "float32 otherwise",
    )
    micro_batch_size: int = Field(
        0, ge=0, description="samples of a training batch that are computed at a time, gradients added up; 0 is the whole batch"
    )
    batch_tokens: int = Field(
        0,
        ge=0,
        description="tokens of a batch at most, padding counted, where nothing is trained; 0 is 65536 on a GPU, and on a CPU "
        "256 images or 4 texts",
    )
    parallel_clients: Count = Field(2, description="clients that a simulation computes at the same time")
    gpus_per_client: Literal["auto"] | NonNegative = Field(
        "auto",
        description="share of a GPU that Ray gives each client of a simulation; auto is the GPUs by the parallel clients",
    )
    connect_timeout: Positive = Field(120.0, description="seconds to wait until all clients are connected")
    timeout: Positive = Field(3_600.0, description="seconds a stage may take before the missing clients are reported")
    rejoin_timeout: NonNegative = Field(
        600.0,
        description="seconds to wait for a client that dropped out to come back, before it is missing; one whose process ended "
        "is asked again, three times at most; 0 is neither",
    )


class Settings(Section):
    """Everything that decides what a run computes."""

    preset: str = Field("glyphs", description="name of the preset that the settings came from; it decides nothing")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="the one seed from which every random choice is derived")
    clients: Count = Field(3, description="number of clients (K)")
    quorum: int = Field(
        0, ge=0, description="clients with which a run goes on when others are missing, who are named; 0 is all of them"
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
    def least_clients(self) -> int:
        """With fewer clients than these a run ends."""
        return self.quorum or self.clients

    @property
    def client_names(self) -> list[str]:
        """The clients' names in order: the domain's, numbered where several clients share one."""
        count = len(self.data.domains)
        return [
            f"{self.client_domain(k)}-{k // count + 1}" if k % count + count < self.clients else self.client_domain(k)
            for k in range(self.clients)
        ]

    @property
    def expert_names(self) -> list[str]:
        """Names of what the router chooses among, in the order of its rows: the clients, and the seed if it is one more."""
        return [*self.client_names, "seed"] if self.router.seed_expert else self.client_names

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
        if self.quorum > self.clients:
            raise ValueError(f"quorum = {self.quorum} is more than clients = {self.clients}")
        experts = min(self.least_clients, self.experts.max) + self.router.seed_expert
        if self.router.top_k > experts:
            few = f"quorum = {self.quorum}" if self.quorum else f"clients = {self.clients}"
            few = few if self.least_clients <= self.experts.max else f"experts.max = {self.experts.max}"
            raise ValueError(f"router.top-k = {self.router.top_k} is more than the {experts} experts of {few}")
        if self.privacy.vectors == "gaussian" and self.router.vectors == "private" and self.router.rows != "fresh":
            raise ValueError(
                "privacy.vectors = gaussian with router.vectors = private: means in an expert that was trained on the same "
                "samples move by more than any bound on one sample's share; set router.vectors = seed or proxy"
            )
        by_classifier = self.proxies.relevance == "classifier" and self.proxies.selection != "random"
        if self.router.mixing == "answers" and self.data.is_text:
            raise ValueError(
                f"router.mixing = answers is for images, not for data.source = {self.data.source}; set router.mixing = layers"
            )
        if self.privacy.vectors == "gaussian" and self.router.statistics == "shape":
            raise ValueError(
                "privacy.vectors = gaussian with router.statistics = shape: the noise covers means, and no covariance; set "
                "router.statistics = mean"
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
