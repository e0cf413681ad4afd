"""A disk that fills up or can only be read: a named error, nothing half, and after more room the same model."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from metamoe.common.audit.verify import Verdict
from metamoe.common.config import Settings
from metamoe.common.errors import LedgerError, MetaMoEError, StateFileError
from metamoe.common.model.artifact import load_model
from metamoe.common.presets import to_toml
from metamoe.simulations.local import run_local
from tests.unit.simulations.test_resume import check, run_until

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, whose size can be changed; only root can have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)


def test_a_disk_that_is_full_again_and_again(small: Settings, finished: Path, small_disk: Path) -> None:
    """Each time there is room for a little more, and so another write fails, at the server or at a client."""
    out, failures = small_disk / "run", list[MetaMoEError]()
    for kilobytes in range(16, 4_000, 128):
        resize(small_disk, kilobytes)
        try:
            run_local(small, out)
        except MetaMoEError as error:
            failures.append(error)
            assert not (out / "model" / "manifest.json").exists() or load_model(out / "model")
        else:
            break
    assert (out / "server" / "summary.json").is_file(), failures[-1]
    assert len(failures) > 5
    assert {type(error) for error in failures} <= {StateFileError, LedgerError}
    check(out, small, load_model(finished / "model").manifest.model_hash)


@pytest.mark.parametrize("stage", ["profile", "expert", "deliver"])
@pytest.mark.parametrize(("part", "error"), [("", StateFileError), ("clients", LedgerError)])
def test_a_folder_that_can_only_be_read(
    small: Settings, finished: Path, small_disk: Path, run_metamoe, stage: str, part: str, error: type[MetaMoEError]
) -> None:
    """All of an interrupted run, or what belongs to clients: it says so, can still be read, and goes on when it may write."""
    out, files = small_disk / "run", ["model/manifest.json", "server/journal.jsonl"]
    resize(small_disk, 8_000)
    out.mkdir()
    (out / "settings.toml").write_text(to_toml(small))
    run_until(small, out, lambda *at: at == (stage, 1, "before"))
    before = {name: (out / name).read_bytes() for name in files if (out / name).is_file()}
    with read_only(out / part):
        assert run_metamoe("resume", str(out)) == error.exit_code
        assert run_metamoe("status", str(out)) == 0
        assert run_metamoe("audit", "verify", str(out)) == Verdict.INCOMPLETE
        # The server may have got further where it is a client that cannot write.
        assert all((out / name).read_bytes().startswith(content) for name, content in before.items())
    assert run_metamoe("resume", str(out)) == 0
    check(out, small, load_model(finished / "model").manifest.model_hash)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that nobody can write, root neither."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        # A file that is mapped into memory may be held a little longer.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
