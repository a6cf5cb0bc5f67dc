"""Events of a stage: written by the main process, read past incomplete lines."""

from stages.runtime.events import EVENTS_FILE, LAUNCHED, emit, read_events


def test_events_are_read_in_their_order_past_incomplete_lines(tmp_path):
    emit(tmp_path, "start", name="训练")
    with open(tmp_path / EVENTS_FILE, "a", encoding="utf-8") as file:
        file.write('{"kind": "st\n7\n{"no": "kind"}\n')
    emit(tmp_path, "step", step=1)
    with open(tmp_path / EVENTS_FILE, "ab") as file:
        file.write(b'{"kind": "step", "s')
    assert [(event["kind"], event.get("name"), event.get("step")) for event in read_events(tmp_path)] == [
        ("start", "训练", None),
        ("step", None, 1),
    ]


def test_a_folder_without_events_has_none(tmp_path):
    assert list(read_events(tmp_path)) == []


def test_of_a_launched_group_only_the_main_process_emits_and_every_process_emits_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    emit(tmp_path, "step")  # not launched: another program's RANK
    monkeypatch.setenv(LAUNCHED, "1")
    emit(tmp_path, "log")
    emit(tmp_path, "error", text="x")
    monkeypatch.setenv("RANK", "0")
    emit(tmp_path, "done")
    assert [event["kind"] for event in read_events(tmp_path)] == ["step", "error", "done"]
