"""The journal of a run: what is not as it was written is not believed, nor what follows it."""

from pathlib import Path

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from metamoe.common.errors import StateFileError
from metamoe.server.journal import JOURNAL, journal_line, read_journal

LINES = [
    {"what": "run", "run": "0" * 32},
    {"what": "reply", "kind": "profile", "name": "digits"},
    {"what": "time", "wall": 0.5},
]


def read(folder: Path, content: bytes) -> list[dict[str, object]] | None:
    (folder / "server").mkdir(exist_ok=True)
    (folder / "server" / JOURNAL).write_bytes(content)
    try:
        return read_journal(folder)
    except StateFileError:
        return None


@given(st.integers(0, 10_000), st.integers(1, 255), st.integers(0, 10_000))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_of_a_damaged_journal_the_lines_before_the_damage_are_believed(
    tmp_path: Path, place: int, flip: int, length: int
) -> None:
    whole = b"".join(map(journal_line, LINES))
    ends = [len(b"".join(map(journal_line, LINES[: i + 1]))) for i in range(len(LINES))]
    damaged = bytearray(whole)
    damaged[place % len(whole)] ^= flip
    assert read(tmp_path, bytes(damaged)) in (LINES[: sum(end <= place % len(whole) for end in ends)] or None, LINES)
    cut = length % (len(whole) + 1)
    assert read(tmp_path, whole[:cut]) == LINES[: sum(end <= cut for end in ends)]


@given(st.binary(max_size=200))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_bytes_crash_its_reader(tmp_path: Path, content: bytes) -> None:
    assert not read(tmp_path, content)
