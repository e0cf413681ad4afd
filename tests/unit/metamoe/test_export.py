"""A unified model as others read it: adapters, dense models, cards, and a hub."""

import base64
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

import metamoe
from metamoe.common.errors import HubError, InvalidSettingError
from metamoe.common.model.artifact import read_manifest, read_weights
from metamoe.export import export_adapters, export_merged, push_model

IDS = torch.tensor([[70, 71, 90, 12, 5]])


@torch.inference_mode()
def test_adapters_are_the_models_own(model: metamoe.Model, tmp_path: Path) -> None:
    command = export_adapters(model.folder, tmp_path / "out")
    assert f"--max-lora-rank 8 --max-loras 3 --lora-modules one={tmp_path / 'out' / 'one'} two=" in command
    assert command in (tmp_path / "out" / "start-engine.sh").read_text()
    seed = AutoModelForCausalLM.from_pretrained(model.manifest.seed_model, dtype=torch.float32)
    before = seed(IDS).logits
    found = PeftModel.from_pretrained(seed, tmp_path / "out" / "two", adapter_name="two")
    for name in ("one", "two", "three"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            kept = model.folder / "experts" / name / file
            assert (tmp_path / "out" / name / file).read_bytes() == kept.read_bytes()
    assert not torch.allclose(found(IDS).logits, before, atol=0.1)


@torch.inference_mode()
def test_a_merged_model_is_the_expert_or_the_mean(model: metamoe.Model, tmp_path: Path) -> None:
    export_merged(model.folder, tmp_path / "two", "two")
    export_merged(model.folder, tmp_path / "soup", "soup")
    seed = AutoModelForCausalLM.from_pretrained(model.manifest.seed_model, dtype=torch.float32)
    name = "model.layers.2.mlp.up_proj.weight"
    original = seed.get_parameter(name).clone()
    expected = PeftModel.from_pretrained(seed, model.folder / "experts" / "two")(IDS).logits
    two, soup = (AutoModelForCausalLM.from_pretrained(tmp_path / own, dtype=torch.float32) for own in ("two", "soup"))
    torch.testing.assert_close(two(IDS).logits, expected, atol=1e-3, rtol=1e-4)
    _, weights = read_weights(model.folder)
    up = "model.layers.2.mlp.up_proj.lora_"
    terms = [own[f"{up}B.weight"].float() @ own[f"{up}A.weight"].float() for own in weights.experts]
    scale = model.manifest.lora.alpha / model.manifest.lora.rank
    torch.testing.assert_close(soup.get_parameter(name), original + scale * sum(terms) / 3, atol=1e-4, rtol=1e-4)
    assert "**not** the unified model" in (tmp_path / "soup" / "README.md").read_text()
    # The seed, which other models share, is as it was.
    torch.testing.assert_close(model.loaded.seed.model.get_parameter(name), original, atol=0, rtol=0)
    with pytest.raises(InvalidSettingError, match="--expert four: there are one, two, three, soup"):
        export_merged(model.folder, tmp_path / "four", "four")


def test_a_card_says_what_the_model_is_and_no_hash_covers_it(finished: Path, tmp_path: Path) -> None:
    folder = finished / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "metamoe-fl"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    manifest = read_manifest(folder)
    results = json.loads((finished / "results.json").read_text()) if (finished / "results.json").is_file() else None
    for told in (*manifest.experts, manifest.model_hash, "differential privacy | none"):
        assert told in card.text
    assert results is None or "## Accuracy" in card.text
    assert "README.md" not in manifest.files
    changed = tmp_path / "model"
    for file in folder.rglob("*"):
        if file.is_file():
            (changed / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (changed / file.relative_to(folder)).write_bytes(file.read_bytes())
    (changed / "README.md").write_text("other words")
    assert read_weights(changed)[0].model_hash == manifest.model_hash


def test_the_command_exports(
    model: metamoe.Model, run_metamoe: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    common = ("export", str(model.folder), "--out", str(tmp_path / "out"), "--to")
    assert run_metamoe(*common, "adapters") == 0
    assert capsys.readouterr().out.startswith("vllm serve ")
    assert run_metamoe(*common, "merged", "--expert", "soup") == 0
    assert "not the unified model" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    for wrong in (("merged",), ("adapters", "--expert", "one")):
        assert run_metamoe(*common, *wrong) == InvalidSettingError.exit_code


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub to take a folder: a repository, how each file goes, and one commit."""

    files: dict[str, bytes]
    place = ""
    refuse = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuse:
            self._say(404, {"error": "Repository not found"})
        elif self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._say(200, {"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                told = json.loads(line)
                if told["key"] == "file":
                    type(self).files[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            self._say(200, {"success": True, "commitUrl": f"{self.place}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._say(200, {"url": self.place, "name": "org/name"})

    def do_GET(self) -> None:
        self._say(200, {"id": "org/name", "sha": "0" * 40, "siblings": []})

    def _say(self, status: int, told: dict[str, object]) -> None:
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_pushed_model_is_the_folder(model: metamoe.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.files, Hub.refuse = {}, False
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.place = f"{address}/org/name"
    api: Callable[[], huggingface_hub.HfApi] = lambda: huggingface_hub.HfApi(endpoint=address, token="hf_none")  # noqa: E731
    monkeypatch.setattr("metamoe.export.HfApi", api)
    try:
        assert push_model(model.folder, "org/name", private=False) == f"{Hub.place}/commit/{'1' * 40}"
        expected = {f.relative_to(model.folder).as_posix(): f.read_bytes() for f in model.folder.rglob("*") if f.is_file()}
        assert expected.items() <= Hub.files.items()
        assert Hub.files.keys() - expected.keys() <= {".gitattributes"}
        Hub.refuse = True
        with pytest.raises(HubError, match="push = 'org/name'"):
            push_model(model.folder, "org/name", private=False)
        monkeypatch.setattr(
            "metamoe.export.HfApi", lambda: huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="hf_none")
        )
        with pytest.raises(HubError, match="cannot be reached from here: the folder is whole, so copy it"):
            push_model(model.folder, "org/name", private=False)
    finally:
        server.shutdown()
