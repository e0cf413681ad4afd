import copy
from importlib import import_module
from pathlib import Path

import pytest
from datasets import Dataset
from gguf import GGUFWriter
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from transformers import LlamaConfig, LlamaForCausalLM

from metamoe.common.config import Settings
from metamoe.common.data.metrics import accuracy
from metamoe.common.data.questions import FEATURES
from metamoe.common.data.tasks import check_seed, samples_of
from metamoe.common.errors import InputFileError, InvalidSettingError
from metamoe.common.hub import hub_error
from metamoe.common.model.seed import Seed, load_seed
from metamoe.simulations.evaluate import dense
from metamoe.simulations.train_seed import tokenizer_for
from tests.conftest import WORDS


def test_a_fingerprint_sees_everything_that_decides_the_output(seed: Seed, seed_folder) -> None:
    again = load_seed.__wrapped__(str(seed_folder))
    assert again.fingerprint == seed.fingerprint

    def other(part: str) -> Seed:
        model, processor, tokenizer = (copy.deepcopy(x) for x in (seed.model, seed.processor, seed.tokenizer))
        match part:
            case "mean":
                processor.image_mean = [0.4, 0.5, 0.5]
            case "size":
                processor.size = {"height": 16, "width": 16}
            case "activation":
                model.config.vision_config.hidden_act = "gelu"
            case "heads":
                model.config.text_config.num_attention_heads = 4
            case "weight":
                model.logit_scale.data += 1
            case "word":
                tokenizer.add_tokens(["surprise"])
        return Seed("elsewhere", model, tokenizer, processor)

    prints = {part: other(part).fingerprint for part in ("nothing", "mean", "size", "activation", "heads", "weight", "word")}
    assert prints.pop("nothing") == seed.fingerprint
    assert len({seed.fingerprint, *prints.values()}) == 7


def test_a_folder_a_file_or_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    for reference, message in (
        (str(tmp_path), r"holds no config.json; give glyphs, a model's folder, a .gguf file, package:NAME, or a hub id"),
        (str(tmp_path / "no" / "such" / "folder"), "holds no config.json"),
        (str(tmp_path / "none.gguf"), "no such file"),
        ("package:no_such_package", "no such package is installed"),
        ("package:not a name", "no such package is installed"),
        ("package:metamoe", "it has 0 .gguf files"),
    ):
        with pytest.raises(InputFileError, match=message):
            load_seed.__wrapped__(reference)


def test_a_gguf_file_of_another_architecture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAMOE_CACHE", str(tmp_path / "cache"))
    writer = GGUFWriter(tmp_path / "model.gguf", "whisper")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputFileError, match=r"model.gguf' cannot be read as a decoder: .*whisper"):
        load_seed.__wrapped__(str(tmp_path / "model.gguf"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(InputFileError, match=r"broken.gguf' cannot be read as a decoder"):
        load_seed.__wrapped__(str(tmp_path / "broken.gguf"))


def test_what_a_hub_does_not_give_says_what_to_do() -> None:
    # The library for HTTP is the hub client's choice.
    http = import_module(HTTPError.__module__.partition(".")[0])
    request = http.Request("HEAD", "https://hub.invalid/org/name")

    def error(kind: type[HfHubHTTPError], status: int) -> OSError:
        wrapped = OSError("cannot load it")
        wrapped.__cause__ = kind("no", response=http.Response(status, request=request))
        return wrapped

    for found, remedy in (
        (error(GatedRepoError, 403), "it is gated: accept its licence on the hub, and log in"),
        (error(RepositoryNotFoundError, 404), "the hub has no such name, or not for you"),
        (ConnectionError("no route"), "the hub cannot be reached from here: download it elsewhere"),
    ):
        message = str(hub_error("seed-model", "org/name", found))
        assert message.startswith("seed-model = 'org/name': ")
        assert remedy in message


def test_a_tokenizer_without_a_padding_token_will_do(tmp_path: Path, settings: Settings) -> None:
    """Padding is never looked at, so no token is needed for it."""
    tokenizer = tokenizer_for(WORDS)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small)).save_pretrained(tmp_path)
    seed = load_seed.__wrapped__(str(tmp_path))
    assert seed.tokenizer.pad_token is None
    rows = [
        {"prompt": "DIGIT ONE", "choices": ["WHITE", "BLACK SQUARE"], "answer": 0},
        {"prompt": "LATIN", "choices": ["A"], "answer": 0},
    ]
    data = settings.data.model_copy(update={"source": "questions"})
    samples = samples_of(seed, data, [Dataset.from_list(rows, features=FEATURES)], [])
    assert 0 <= accuracy(dense(seed.model), samples) <= 100


def test_a_seed_for_other_data_is_refused(seed: Seed, settings: Settings) -> None:
    with pytest.raises(InvalidSettingError, match=r"is a CLIP model, for images; it does not go with data.source = questions"):
        check_seed(seed, settings.data.model_copy(update={"source": "questions"}))
