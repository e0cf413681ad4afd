"""What commands load, and what they leave alone: nobody waits for a library that is not used."""

import gc
import subprocess
import sys

import pytest

from metamoe.common.errors import InvalidSettingError, UnknownSettingError
from metamoe.common.loading import loading

_HEAVY = {"torch", "transformers", "datasets", "flwr", "ray", "peft", "scipy", "sklearn", "pandas", "matplotlib", "opacus"}


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a Python of its own has loaded after some code."""
    shown = f"import sys\n{code}\nprint('LOADED', *({_HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["presets"], 0),
        (["simulate", "--help"], 0),
        (["simulate", "--set", "wrong=1"], UnknownSettingError.exit_code),
        (["benchmark", "--set", "wrong=1"], UnknownSettingError.exit_code),
        (["benchmark", "--methods", "wrong"], InvalidSettingError.exit_code),
        (["presets", "--check", "glyphs", "--set", "clients=0"], InvalidSettingError.exit_code),
        (["client", "check", "data", "--set", "wrong=1"], UnknownSettingError.exit_code),
        (["deploy", "run", "federation", "--set", "wrong=1"], UnknownSettingError.exit_code),
        (["audit", "policy", "--set", "wrong=1"], UnknownSettingError.exit_code),
        (["audit", "canary", "--set", "wrong=1"], UnknownSettingError.exit_code),
    ],
)
def test_help_and_wrong_settings_answer_before_anything_large_is_loaded(arguments: list[str], code: int) -> None:
    assert not loaded_by(
        f"""from metamoe.cli import main
sys.argv = {["metamoe", *arguments]!r}
try:
    main()
except SystemExit as end:
    assert end.code == {code}, end.code
"""
    )


def test_asking_a_model_loads_no_data_sets_and_nothing_that_trains() -> None:
    loaded = loaded_by("import metamoe.common.model.artifact, metamoe.common.data.tasks")
    assert "torch" in loaded
    assert not loaded & {"datasets", "pandas", "peft", "sklearn", "matplotlib", "flwr", "ray", "opacus"}


def test_data_sets_are_opened_without_a_model() -> None:
    assert not loaded_by("import metamoe.common.data.datasets") & {"torch", "transformers", "matplotlib", "sklearn", "scipy"}


def test_no_garbage_is_looked_for_while_loading_and_only_then() -> None:
    assert gc.isenabled()
    enabled = []

    def broken() -> None:
        with loading():
            enabled.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        broken()
    assert enabled == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        with loading():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
