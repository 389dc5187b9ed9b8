import json
import threading

import pytest

from gnuq_serve.service.operator.control import Control, ControlError, ControlState


def test_nothing_said(tmp_path):
    assert Control(tmp_path / "c.json").state == ControlState(scoring=True, generation=0, changed=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", [True, False])
def test_changes(tmp_path, shared):
    control = Control(tmp_path / "c.json" if shared else None)
    assert control.change(scoring=False).scoring is False
    assert control.change(reload=True).generation == 1
    assert (control.state.scoring, control.state.generation) == (False, 1)
    assert control.change(scoring=True).changed is not None


def test_every_process_of_the_server_sees_them_and_so_does_the_next_start(tmp_path):
    first, second = Control(tmp_path / "c.json"), Control(tmp_path / "c.json")
    assert second.state.scoring
    first.change(scoring=False)
    assert not second.state.scoring
    second.change(reload=True)
    assert (first.state.scoring, first.state.generation) == (False, 1)
    assert not Control(tmp_path / "c.json").state.scoring


def test_changes_at_once_are_all_kept(tmp_path):
    def reload_often():
        control = Control(tmp_path / "c.json")
        for _ in range(25):
            control.change(reload=True)

    threads = [threading.Thread(target=reload_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Control(tmp_path / "c.json").state.generation == 100


@pytest.mark.parametrize("content", [b"", b"{", b'{"scoring": 3}'])
def test_a_damaged_file_changes_nothing_and_is_told_once(tmp_path, caplog, content):
    path = tmp_path / "c.json"
    control = Control(path)
    control.change(scoring=False)
    path.write_bytes(content)
    assert not control.state.scoring
    assert not control.state.scoring
    assert caplog.text.count(f"{path} can't be read") == 1
    path.unlink()  # cleaned away
    assert not control.state.scoring
    control.change(scoring=True)
    assert json.loads(path.read_bytes())["scoring"] is True


def test_a_folder_that_is_gone(tmp_path):
    control = Control(tmp_path / "gone" / "c.json")
    with pytest.raises(ControlError, match=r"c\.json can't be written"):
        control.change(scoring=False)
    assert control.state.scoring


def test_servers_of_other_names_have_files_of_their_own():
    names = {Control.of(name)._path for name in ("None:0.0.0.0:8000", "None:0.0.0.0:8001")}
    assert len(names) == 2
