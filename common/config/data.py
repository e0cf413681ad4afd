"""Settings of the data."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from metamoe.common.config.section import Count, Name, Positive, Section, Share

Colour = Annotated[str, Field(pattern=r"^(white|black|#[0-9a-fA-F]{6})$")]
ListChoices = Literal["always", "where-needed"]
AnswerIs = Literal["index", "one-based", "letter", "text", "boolean"]


class Splits(Section):
    """The parts of a data set: by their names, or by fractions where a set has not been divided."""

    train: str = Field("", description="name of the part that trains; empty: train or training")
    validation: str = Field("", description="of the part for validation; empty: validation, valid, val or dev")
    test: str = Field("", description="of the part for tests; empty: test or testing")
    validation_fraction: Share = Field(0.1, description="of what trains, for validation, where there is no such part")
    test_fraction: Share = Field(0.2, description="of the whole, for tests, where there is no part to test on")


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


class Partition(Section):
    """How clients that share a domain divide what trains of it; tests and validation are of the whole domain."""

    kind: Literal["dirichlet", "iid", "pathological", "natural", "sizes"] = Field(
        "dirichlet",
        description="dirichlet: each class by a draw, data.dirichlet; iid: evenly; pathological: few classes each; natural: "
        "each value of a column is a client, such as a writer or a hospital; sizes: as large as they say",
    )
    classes: Count = Field(2, description="of each client, with kind = pathological")
    column: str = Field("", description="of a table, a file or a hub set, with kind = natural")
    sizes: tuple[Positive, ...] = Field(
        (), description="of the clients of each domain, relative to each other, with kind = sizes: [1, 2, 4]"
    )


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
    streaming: bool = Field(
        False,
        description="leave the pictures of data.public-hub at the hub, and fetch each when it is used: for a set larger than "
        "the disk (source = images, Parquet files)",
    )
    domains: tuple[Name, ...] = Field(
        ("digits", "greek", "arrows"), min_length=1, description="of the source; with private = own any names, one a client"
    )
    classes: tuple[str, ...] = Field(
        (), description="names of the classes of the clients' own data, as far as they are not public; known to all"
    )
    dirichlet: Positive = Field(1.0, description="concentration of the class mix when several clients share a domain")
    partition: Partition = Partition()
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
        if self.streaming and (self.source != "images" or self.folder or not self.public_hub):
            raise ValueError("data.streaming = true is for data.source = images with data.public-hub and without data.folder")
        way = self.partition
        if way.kind != "dirichlet" and self.private == "own":
            raise ValueError(f"data.partition.kind = {way.kind} with data.private = own, where each client has its own data")
        if way.kind == "natural" and not way.column:
            raise ValueError("data.partition.kind = natural needs data.partition.column, such as writer or hospital")
        if way.column and way.kind != "natural":
            raise ValueError(f"data.partition.column = {way.column!r} is for data.partition.kind = natural, not {way.kind}")
        if way.kind == "natural" and self.source == "glyphs":
            raise ValueError("data.partition.kind = natural goes by a column, and data.source = glyphs has none")
        if way.kind == "sizes" and not way.sizes:
            raise ValueError("data.partition.kind = sizes needs data.partition.sizes, such as [1, 2, 4]")
        if "{}" not in self.prompt:
            raise ValueError(f"prompt = {self.prompt!r} has no {{}} for the class name")
        return self
