from pathlib import Path

from metamoe.common.events import Event, EventLog, read_events


def test_events_are_read_on_from_where_one_stopped(tmp_path: Path) -> None:
    file = tmp_path / "run" / "events.jsonl"
    assert list(read_events(file)) == []
    log = EventLog(file)
    log("embed", 1, 2)
    ((first, position),) = read_events(file)
    assert first == Event("embed", 1, 2)
    log("expert", 1, 3, "greek")
    ((second, end),) = read_events(file, position)
    assert second == Event("expert", 1, 3, "greek")
    assert list(read_events(file, end)) == []


def test_a_line_still_being_written_waits(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    EventLog(file)("embed", 1, 2)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:-5])
    ((_, position),) = read_events(file)
    file.write_bytes(whole + whole)
    assert len(list(read_events(file, position))) == 1
