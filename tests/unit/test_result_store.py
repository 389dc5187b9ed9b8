import asyncio
import os
import sqlite3
import stat
import subprocess
import sys

import pytest

from gnuq_serve.service.result_store import ResultStore, ResultStoreError, default_path


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = ResultStore(tmp_path / "results.sqlite", keep=3, keep_seconds=60, clock=clock)
    yield store
    store.close()


def put(store, result_id, status="scored", **more):
    asyncio.run(store.put({"id": result_id, "status": status}, **more))


def get(store, result_id):
    return asyncio.run(store.get(result_id))


def test_what_is_put_is_got(store):
    put(store, "unc-1")
    assert get(store, "unc-1") == {"id": "unc-1", "status": "scored"}
    assert get(store, "unc-2") is None
    assert get(store, "' OR 1=1 --") is None


def test_a_pending_result_is_replaced(store):
    put(store, "unc-1", "pending", pending_seconds=10)
    assert get(store, "unc-1")["status"] == "pending"
    put(store, "unc-1")
    assert get(store, "unc-1")["status"] == "scored"


def test_a_pending_result_whose_server_is_gone_has_failed(store, clock):
    put(store, "unc-1", "pending", pending_seconds=10)
    put(store, "unc-2")
    clock.now += 11
    assert get(store, "unc-1")["status"] == "failed"
    assert "ended" in get(store, "unc-1")["reason"]
    assert get(store, "unc-2")["status"] == "scored"


def test_the_newest_are_kept(store):
    for i in range(5):
        put(store, f"unc-{i}")
    assert [get(store, f"unc-{i}") is not None for i in range(5)] == [False, False, True, True, True]


def test_the_old_are_forgotten(store, clock):
    put(store, "unc-1")
    clock.now += 61
    assert get(store, "unc-1") is None
    put(store, "unc-2")
    rows = sqlite3.connect(store.path).execute("SELECT id FROM results").fetchall()
    assert rows == [("unc-2",)]


def test_only_this_user_can_read_it(store):
    put(store, "unc-1")
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_it_outlives_who_wrote_it(store, clock):
    put(store, "unc-1")
    store.close()
    again = ResultStore(store.path, keep=3, keep_seconds=60, clock=clock)
    assert get(again, "unc-1")["status"] == "scored"
    again.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from gnuq_serve.service.result_store import ResultStore

async def main():
    store = ResultStore(Path(sys.argv[1]), keep=10_000, keep_seconds=600)
    for i in range(200):
        await store.put({"id": f"unc-{sys.argv[2]}-{i}", "status": "scored"})
    store.close()

asyncio.run(main())
"""


def test_several_processes_write_at_once(tmp_path):
    path = tmp_path / "results.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(i)]) for i in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    store = ResultStore(path, keep=10_000, keep_seconds=600)

    async def all_there():
        return [await store.get(f"unc-{i}-{j}") is not None for i in range(3) for j in range(200)]

    assert all(asyncio.run(all_there()))
    store.close()


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    store = ResultStore(tmp_path / "nowhere" / "results.sqlite", keep=3, keep_seconds=60)
    for work in (store.put({"id": "unc-1"}), store.get("unc-1")):
        with pytest.raises(ResultStoreError, match=r"results_path=.*nowhere"):
            asyncio.run(work)
    store.close()
    with pytest.raises(ResultStoreError):
        asyncio.run(store.get("unc-1"))


def test_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "results.sqlite"
    path.write_text("something else " * 100)
    store = ResultStore(path, keep=3, keep_seconds=60)
    with pytest.raises(ResultStoreError):
        put(store, "unc-1")
    store.close()


def test_the_default_file_is_one_for_each_server_and_private(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = default_path("None:0.0.0.0:8000")
    assert path == default_path("None:0.0.0.0:8000")
    assert path != default_path("None:0.0.0.0:8001")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_can_enter_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"gnuq-serve-{os.getuid()}").mkdir()
    (tmp_path / f"gnuq-serve-{os.getuid()}").chmod(0o755)
    with pytest.raises(ResultStoreError, match="results_path"):
        default_path("x")
