import io
import json
import logging
import subprocess
import sys

import pytest

from gnuq_serve.service.seeing.logs import JsonFormatter, TextFormatter, answer_observer
from gnuq_serve.service.seeing.observation import Observation, RequestContext
from gnuq_serve.uncertainty import Uncertainty

SCORED = Uncertainty(id="unc-1", status="scored", mode="exact", tokens=2, log_probability=-1.5, decision="answer")
FAILED = Uncertainty.failed('the scorer is not running: "x" is\nno model').replace(id="unc-2")


@pytest.fixture
def lines():
    """``lines(formatter)``: the stream that our log goes to."""
    logger, handlers = logging.getLogger("gnuq_serve"), []
    before = logger.level

    def attach(formatter):
        stream = io.StringIO()
        handlers.append(logging.StreamHandler(stream))
        handlers[-1].setFormatter(formatter)
        logger.addHandler(handlers[-1])
        logger.setLevel(logging.INFO)
        return stream

    yield attach
    for handler in handlers:
        logger.removeHandler(handler)
    logger.setLevel(before)


def tell(level, result):
    context = RequestContext(route="chat", api_key_hash="secret-hash")
    answer_observer(level)(Observation(result=result.to_dict(), context=context, prompt_tokens=7))


def test_one_json_line_for_an_answer(lines):
    stream = lines(JsonFormatter())
    tell(logging.INFO, SCORED)
    tell(logging.INFO, FAILED)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "info",
        "logger": "gnuq_serve.answers",
        "message": "answer scored",
        "id": "unc-1",
        "status": "scored",
        "route": "chat",
        "mode": "exact",
        "tokens": 2,
        "log_probability": -1.5,
        "tool_call": False,
        "decision": "answer",
        "gen_ai.usage.prompt_tokens": 7,
    }
    assert (second["reason"], second["reason_code"]) == (FAILED.reason, "scorer_unavailable")


def test_one_text_line_for_an_answer(lines):
    stream = lines(TextFormatter())
    tell(logging.INFO, FAILED)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("INFO ")
    assert '[gnuq_serve.answers] answer failed id="unc-2" status="failed"' in line
    assert r'reason="the scorer is not running: \"x\" is\nno model"' in line


def test_below_the_level_of_the_log_nothing_is_said(lines):
    stream = lines(JsonFormatter())
    tell(logging.DEBUG, SCORED)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_other_lines_and_tracebacks(lines, formatter):
    stream = lines(formatter)
    try:
        raise ValueError("what")
    except ValueError:
        logging.getLogger("gnuq_serve.service").exception("it broke: %d", 7)
    text = stream.getvalue()
    assert "it broke: 7" in text
    assert "ValueError: what" in text
    if isinstance(formatter, JsonFormatter):
        assert json.loads(text)["exception"].startswith("Traceback")


def configured(before):
    """What standard error shows of a debug, an info and an answer's line in a fresh process."""
    program = f"""
import logging
from gnuq_serve.service.seeing.logs import configure_logging, answer_observer
from gnuq_serve.service.seeing.observation import Observation
{before}
configure_logging("info", "json")
logging.getLogger("gnuq_serve.x").info("the scorer is ready")
logging.getLogger("gnuq_serve.x").debug("too much")
answer_observer(logging.INFO)(Observation(result={{"status": "scored", "id": "unc-1"}}))
logging.getLogger("other").info("not ours")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    return run.stderr.splitlines()


def test_our_log_is_seen_where_nobody_set_one_up():
    ready, answer = map(json.loads, configured(""))
    assert (ready["message"], answer["id"]) == ("the scorer is ready", "unc-1")


@pytest.mark.parametrize(
    "before",
    [
        'logging.basicConfig(format="mine %(message)s", level="INFO")',
        'logging.getLogger("gnuq_serve").addHandler(logging.NullHandler())',
    ],
)
def test_a_log_that_the_operator_set_up_stays_as_it_is(before):
    assert configured(before) == (
        ["mine the scorer is ready", "mine answer scored", "mine not ours"] if "basicConfig" in before else []
    )
