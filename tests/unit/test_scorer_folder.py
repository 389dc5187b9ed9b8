"""The folder where a server's processes meet: one leads, and another does when it is gone."""

import multiprocessing
import stat
import tempfile

import pytest

from gnuq_serve.service.private_folder import PrivateFolderError
from gnuq_serve.service.scorer.folder import ScorerFolder
from gnuq_serve.service.scorer.messages import ScorerConfig, ScorerState
from gnuq_serve.service.scorer.shared_state import SharedState

CONFIG = ScorerConfig(model="m", served_model="m")
READY = SharedState(state=ScorerState(status="ready", model="m"), endpoint="ipc:///x", start_seconds=3.5)


@pytest.fixture(autouse=True)
def temp(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def folder(server="0.0.0.0:8000", config=CONFIG):
    return ScorerFolder.of(server, config)


def test_one_leads_and_the_others_read():
    first, second = folder(), folder()
    assert second.abandoned()
    assert not first.path.exists()
    assert first.lead()
    assert first.lead()
    assert not second.abandoned()
    assert not second.lead()
    assert second.read() is None
    first.write(READY)
    assert second.read() == READY
    first.release()
    assert first.abandoned()
    assert second.lead()
    assert not first.lead()


def test_servers_that_score_otherwise_do_not_meet():
    others = [
        folder("0.0.0.0:8001"),
        folder(config=ScorerConfig(model="m", served_model="m", dtype="bfloat16")),
        folder(None),
        folder(None),
    ]
    paths = {one.path for one in [folder(), folder(), *others]}
    assert len(paths) == 1 + len(others)


def test_only_this_user_can_enter(temp):
    one = folder()
    one.lead()
    for path in (one.path, one.path.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    name = one.new_endpoint().removeprefix(f"ipc://{temp}")
    assert len(name) < 64  # a Unix socket's path holds 107 bytes
    assert one.new_endpoint() != one.new_endpoint()


def test_a_folder_that_others_may_enter_is_refused():
    one = folder()
    one.path.mkdir(parents=True, mode=0o755)
    one.path.parent.chmod(0o700)
    with pytest.raises(PrivateFolderError, match="no folder of this user alone"):
        one.lead()


def test_removed_by_its_holder_only():
    first, second = folder(), folder()
    first.lead()
    first.write(READY)
    assert not second.remove()
    assert second.read() == READY
    assert first.remove()
    assert not first.path.exists()
    assert first.remove()  # a second time is nothing
    assert second.lead()


def test_a_leader_whose_folder_was_removed_leads_no_more():
    first, second = folder(), folder()
    first.lead()
    first.path.rmdir()
    with pytest.raises(FileNotFoundError):
        first.write(READY)
    assert second.lead()
    second.write(READY)
    assert not first.lead()
    assert not first.remove()
    assert second.read() == READY


def _lead(path, pipe):
    pipe.send((holder := ScorerFolder(path)).lead())
    pipe.recv()
    holder.release()


def test_the_kernel_takes_the_lock_from_a_process_that_dies():
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    one = folder()
    process = context.Process(target=_lead, args=(one.path, there))
    process.start()
    assert here.recv()
    assert not one.lead()
    process.kill()
    process.join()
    assert one.lead()
