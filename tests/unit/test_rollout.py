"""Switch, share, reload, log, labels, drift: the service and its routes in process, with given scores."""

import asyncio
import json
import random
import tempfile

import httpx
import pytest
from made_calibration import made_calibration, saved
from starlette.applications import Starlette

from gnuq_serve.service.answer import Answer
from gnuq_serve.service.operator import audit_watch
from gnuq_serve.service.operator.control import Control
from gnuq_serve.service.operator.label_store import read_labels
from gnuq_serve.service.operator.rollout import SWITCHED_OFF
from gnuq_serve.service.operator.routes import HEADER
from gnuq_serve.service.result_store import ResultStore
from gnuq_serve.service.routes import routes
from gnuq_serve.service.seeing import metrics
from gnuq_serve.service.seeing.observation import RequestContext
from gnuq_serve.service.served import Server
from gnuq_serve.service.service import UncertaintyService
from gnuq_serve.service.settings.model import Settings, SettingsError, load_settings
from gnuq_serve.uncertainty import Uncertainty

KEY = "an-operators-key-of-32-letters"
ANSWER = Answer([1, 2, 3], [4, 5], finish_reason="stop")


class GivenScores(UncertaintyService):
    """The service with all but the scorer process; each answer's mean token log-probability is ``surprise``."""

    surprise = -0.2

    def start(self, name="test"):
        self.server = Server(name=name)
        self.rollout.start(name, self.observers)
        self._store = ResultStore(self.folder / "results.sqlite", keep=100, keep_seconds=1000)

    async def _score_span(self, *_, **__):
        token = self.surprise
        return Uncertainty.scored(
            token_log_probabilities=[token, token], token_entropies=[0.1, 0.2], grad_norm_sq=3.0
        )


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = tmp_path / "gnuq.yaml"
    made = []

    def make(**settings):
        config.write_text(json.dumps({"operator_key": KEY, **settings}))
        service = GivenScores(load_settings(str(config)), lambda: load_settings(str(config)))
        service.folder = tmp_path
        service.start()
        made.append(service)
        return service

    make.config = config
    yield make
    for service in made:
        asyncio.run(service.stop())


def score(service, times=1, route="chat"):
    """The results of as many requests."""

    async def go():
        results = []
        for _ in range(times):
            results += await service.score([ANSWER], context=RequestContext(route=route, turns=1))
        await asyncio.gather(*service._background)
        return results

    return asyncio.run(go())


def call(service, method, path, key=KEY, **request):
    async def go():
        app = Starlette(routes=routes(service))
        headers = {} if key is None else {HEADER: key}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
            return await client.request(method, f"/v1/uncertainty/{path}", headers=headers, **request)

    return asyncio.run(go())


ROUTES = [
    ("GET", "switch"),
    ("POST", "switch"),
    ("POST", "reload"),
    ("GET", "audits"),
    ("POST", "unc-1/feedback"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY + "x"])
def test_the_operators_routes_need_the_operators_key(make, method, path, key):
    service = make()
    response = call(service, method, path, key, json={"scoring": False, "correct": True})
    assert response.status_code == 403
    assert HEADER in response.json()["error"]["message"]
    assert KEY not in response.text
    assert service.rollout.control.state.scoring


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_key_they_are_off(make, method, path):
    response = call(make(operator_key=None), method, path, "", json={"scoring": False})
    assert response.status_code == 403
    assert "set operator_key" in response.json()["error"]["message"]


def test_switch(make):
    service, other = make(), make()  # two processes of one server
    assert call(service, "POST", "switch", json={"scoring": False}).json()["scoring"] is False
    for process in (service, other):
        (result,) = score(process)
        assert (result["status"], result["reason"]) == ("skipped", SWITCHED_OFF)
        assert call(process, "GET", "switch").json()["scoring"] is False
        assert call(process, "GET", "health").json()["scoring"] is False
    call(other, "POST", "switch", json={"scoring": True})
    assert score(service)[0]["status"] == "scored"


@pytest.mark.parametrize("body", [{}, {"scoring": "no"}, {"scoring": 0}, {"on": False}, [], "x"])
def test_switch_mistakes(make, body):
    service = make()
    response = call(service, "POST", "switch", json=body)
    assert response.status_code == 400
    assert "scoring" in response.json()["error"]["message"]
    assert service.rollout.control.state.scoring


def test_a_share_of_the_requests_is_scored(make):
    random.seed(5)
    service = make(score_fraction=0.3)
    reasons = [service.rollout.not_now() for _ in range(2000)]
    assert set(reasons) == {None, "not drawn: score_fraction=0.3"}
    assert 0.27 < reasons.count(None) / 2000 < 0.33  # 3 standard errors
    # Once drawn, or where a client gives an answer to be scored, there is no second draw.
    assert {result["status"] for result in score(service, 50)} == {"scored"}


def test_reload_takes_files_and_shares_and_names_what_wants_a_restart(make, tmp_path):
    service, other = make(), make()
    assert score(service)[0]["calibration"] is None
    path = saved(tmp_path)
    make.config.write_text(
        json.dumps({"operator_key": KEY, "calibrations": {"faq": path}, "score_fraction": 0.0, "max_queue": 7})
    )
    body = call(service, "POST", "reload").json()
    assert body == {"calibrations": {"faq": made_calibration().id}, "wants_restart": ["max_queue"]}
    assert service.settings.max_queue == 256
    for process in (service, other):
        assert process.rollout.not_now() is not None  # the other process notices here
        (result,) = score(process)
        assert (result["calibration"], result["decision"]) == (made_calibration().id, "answer")
    changed = saved(tmp_path, confidence=0.9)  # the same file with other content
    assert changed == path
    body = call(other, "POST", "reload").json()
    assert body["calibrations"] == {"faq": made_calibration(confidence=0.9).id}
    assert score(service)[0]["calibration"] == made_calibration(confidence=0.9).id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calibrations": {"faq": "/nowhere.json"}}, "calibrations.faq: /nowhere.json: No such file"),
        ({"calibrationz": {}}, "unknown key 'calibrationz'; did you mean 'calibrations'"),
        ({"score_fraction": 2}, "score_fraction: .*less than or equal to 1"),
        ({"audit_fraction": 0.1, "score_log": "/tmp/x"}, "want a restart: score_log"),
    ],
)
def test_a_reload_that_fails_changes_nothing(make, tmp_path, caplog, change, message):
    path = saved(tmp_path)
    service = make(calibrations={"faq": path})
    make.config.write_text(json.dumps({"operator_key": KEY, **change}))
    response = call(service, "POST", "reload")
    assert response.status_code == 400
    with pytest.raises(SettingsError, match=message):
        raise SettingsError(response.json()["error"]["message"])
    assert score(service)[0]["calibration"] == made_calibration().id
    # Another process that can't read them any more goes on as well.
    Control.of("test").change(reload=True)
    assert score(service)[0]["calibration"] == made_calibration().id
    assert caplog.text.count("the old ones hold") == 1


@pytest.mark.parametrize("name", ["score_log", "labels_path"])
def test_a_folder_that_is_not_there_is_told_at_the_start(make, name):
    with pytest.raises(SettingsError, match=f"{name}=/nowhere/a.file: there is no folder /nowhere"):
        make(**{name: "/nowhere/a.file"})


def test_settings_that_cannot_hold():
    with pytest.raises(ValueError, match="audit_fraction needs a place"):
        Settings(audit_fraction=0.1)
    with pytest.raises(ValueError, match="log_text"):
        Settings(log_text=True)
    assert str(Settings(score_log="/x/a.jsonl").labels_file) == "/x/a.jsonl.labels.sqlite"


def test_log_and_audit_and_feedback(make, tmp_path):
    log = tmp_path / "scores.jsonl"
    service = make(score_log=str(log), audit_fraction=1.0, calibrations={"faq": saved(tmp_path)})
    results = score(service, 30)
    assert all(result["audit"] for result in results)
    assert "audit" not in score(service, route="uncertainty")[0]  # an answer that the client gave
    for number, result in enumerate(results[:29]):
        response = call(
            service, "POST", f"{result['id']}/feedback", json={"index": 0, "correct": number % 2 == 0}
        )
        assert response.json() == {"id": result["id"], "correct": number % 2 == 0, "audit": True}
    complaint = {"correct": False, "source": "user"}
    assert call(service, "POST", f"{results[29]['id']}/feedback", json=complaint).json()["audit"] is False
    (report,) = call(service, "GET", "audits").json()["audits"]
    assert (report["right"], report["wrong"], report["waiting"]) == (15, 14, 1)
    assert (report["calibration"], report["max_error"], report["broken"]) == (made_calibration().id, 0.1, True)
    labels = (made_calibration().id, "0.1")
    assert metrics.AUDIT_ANSWERS.labels(*labels, "wrong")._value.get() == 14
    assert metrics.AUDIT_BROKEN.labels(*labels)._value.get() == 1
    asyncio.run(service.stop())
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["id"] for row in rows[:30]] == [result["id"] for result in results]
    assert rows[30]["route"] == "uncertainty"
    labelled = read_labels(service.settings.labels_file)
    assert len(labelled) == 29
    assert labelled[3].row == rows[3]


def test_a_broken_promise_is_told_once(make, tmp_path, caplog, monkeypatch):
    service = make(
        labels_path=str(tmp_path / "labels.sqlite"), audit_fraction=1.0, calibrations={"faq": saved(tmp_path)}
    )
    for result in score(service, 12):
        call(service, "POST", f"{result['id']}/feedback", json={"correct": False})

    async def label_and_wait():
        service.rollout.audits._task = None  # the loop of the last call is gone
        await service.rollout.label(result["id"], correct=False)
        service.rollout.audits.show_soon()  # one is under way
        await service.rollout.audits._task
        await service.rollout.audits.reports()

    monkeypatch.setattr(audit_watch, "_MOMENT", 0.01)
    asyncio.run(label_and_wait())
    assert caplog.text.count("contradict that") == 1
    assert made_calibration().id in caplog.text


def test_decisions_without_a_promise_are_audited_for_none(make, tmp_path):
    service = make(
        labels_path=str(tmp_path / "labels.sqlite"),
        audit_fraction=1.0,
        calibrations={"faq": saved(tmp_path)},
        policy={"answer": 0.5},
    )
    (result,) = score(service)
    assert result["decision"] == "answer"
    call(service, "POST", f"{result['id']}/feedback", json={"correct": False})
    assert call(service, "GET", "audits").json()["audits"] == []
    assert len(read_labels(tmp_path / "labels.sqlite")) == 1


def test_volunteered_feedback(make, tmp_path):
    service = make(labels_path=str(tmp_path / "labels.sqlite"))
    (result,) = score(service)
    assert "audit" not in result
    body = call(service, "POST", f"{result['id']}/feedback", json={"correct": False}).json()
    assert body["audit"] is False
    (labelled,) = read_labels(tmp_path / "labels.sqlite")
    assert (labelled.audit, labelled.correct, labelled.row["uncertainty"]) == (False, False, result)


def test_feedback_mistakes(make, tmp_path):
    service = make(labels_path=str(tmp_path / "labels.sqlite"))
    (scored,) = score(service)
    skipped = service_skip(service)
    cases = [
        ("unc-unknown", {"correct": True}, 404, "unknown or forgotten"),
        (skipped["id"], {"correct": True}, 400, "has no score: skipped"),
        (scored["id"], {"correct": "yes"}, 400, "correct must be true or false"),
        (scored["id"], {"correct": True, "index": 1}, 400, "index"),
        (scored["id"], {"correct": True, "index": True}, 400, "index must be a whole number"),
        (scored["id"], {"correct": True, "source": "x"}, 400, "source must be"),
        (scored["id"], {"correct": True, "label": 1}, 400, "label is unknown here"),
        (scored["id"], {}, 400, "correct is missing"),
    ]
    for answer_id, body, status, message in cases:
        response = call(service, "POST", f"{answer_id}/feedback", json=body)
        assert (response.status_code, message in response.json()["error"]["message"]) == (status, True), body
    assert read_labels(tmp_path / "labels.sqlite") == []
    nowhere = make()
    (scored,) = score(nowhere)
    response = call(nowhere, "POST", f"{scored['id']}/feedback", json={"correct": True})
    assert response.status_code == 409
    assert "labels_path" in response.json()["error"]["message"]


def service_skip(service):
    async def go():
        (result,) = service.skip(1, "too long")
        await asyncio.gather(*service._background)
        return result

    return asyncio.run(go())


def test_drift_is_told_once_and_shown(make, tmp_path, caplog):
    reference = tuple(round(0.85 + 0.001 * i, 6) for i in range(100))
    service = make(drift_window=20, calibrations={"faq": saved(tmp_path, reference_scores=reference)})
    name = made_calibration(reference_scores=reference).id
    random.seed(1)
    service.surprise = -0.2  # p_correct .88
    score(service, 20, route="uncertainty")  # given by the client: none of ours
    assert call(service, "GET", "audits").json()["drift"] == {}
    service.surprise = -1.0  # p_correct .5
    score(service, 60)
    drift = call(service, "GET", "audits").json()["drift"][name]
    assert drift["drifted"]
    assert (drift["window"], drift["reference"]) == (20, 100)
    assert caplog.text.count("its promise may no longer hold") == 1
    assert metrics.DRIFTED.labels(name)._value.get() == 1
    assert metrics.DRIFT_STATISTIC.labels(name)._value.get() == 1.0
