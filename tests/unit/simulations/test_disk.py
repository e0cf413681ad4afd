"""A disk that fills up while a run goes on: a named error, nothing half, and after more room the same model."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from metamoe.common.config import Settings
from metamoe.common.errors import LedgerError, MetaMoEError, StateFileError
from metamoe.common.model.artifact import load_model
from metamoe.simulations.local import run_local
from tests.unit.simulations.test_resume import check

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
