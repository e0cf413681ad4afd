"""A small model of text that reads bytes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import metamoe
from metamoe.common.config import Settings
from metamoe.common.model.artifact import UnifiedWeights, save_model
from metamoe.common.model.router import RouterWeights
from metamoe.common.model.seed import load_seed
from metamoe.common.presets import changed
from tests.conftest import random_expert, random_features

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and one for the end of a text."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=TEMPLATE)


def byte_model(folder: Path, *changes: str) -> metamoe.Model:
    """A model of text with random weights that reads 128 bytes; routing is decided once, among three experts and the seed."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), initializer_range=0.3, eos_token_id=256, max_position_embeddings=128, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder / "seed")
    tokenizer.save_pretrained(folder / "seed")
    seed = load_seed(str(folder / "seed"))
    settings = changed(Settings(), [f"seed-model={folder / 'seed'}", "lora.rank=2", "lora.first-layer=1", *changes])
    rows = random_features(4, 64).astype(np.float32)
    routers = [RouterWeights(rows, np.zeros(4, dtype=np.float32), settings.router.context)]
    weights = UnifiedWeights([random_expert(seed, settings, k) for k in range(3)], routers)
    save_model(folder / "model", seed, settings, ["one", "two", "three"], [], weights)
    return metamoe.load(folder / "model")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> metamoe.Model:
    return byte_model(tmp_path_factory.mktemp("bytes"), "router.context=0.9")


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """Where a process of its own serves what a command says; it ends cleanly when it is asked to."""
    command = [sys.executable, "-c", "from metamoe.cli import main; main()", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    line = process.stderr.readline()
    while line and "is served at" not in line:
        line = process.stderr.readline()
    try:
        yield line.split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.wait() == 0
    assert "Traceback" not in rest
