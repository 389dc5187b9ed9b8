"""The working file: what is written is read, a torn end is mended, other settings and other files are refused."""

import json

import pytest

from gnuq_serve import Uncertainty
from gnuq_serve.calibration.working_file import Answer, WorkingFile, WorkingFileError

SETTINGS = {"model": "tiny", "temperature": 0.0, "uncertainty": {"mode": "exact"}}
SCORE = Uncertainty.scored(token_log_probabilities=[-0.5], token_entropies=[0.1], grad_norm_sq=3.0)
ANSWER = Answer(key="k1", text="Grüße,\nParis", uncertainty=SCORE, finish_reason="stop", prompt_tokens=9)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "w.jsonl"
    refused = Answer(key="k2", failure="too long")
    with WorkingFile(path, SETTINGS) as work:
        work.add(ANSWER)
        work.add(refused)
        work.add_verdict("k1", "big@1", True)
    with WorkingFile(path, SETTINGS) as work:
        assert work.answers == {"k1": ANSWER, "k2": refused}
        assert work.verdicts == {("k1", "big@1"): True}
    assert (ANSWER.scored, refused.scored) == (True, False)


def test_an_answer_that_is_replaced_takes_its_verdicts_along(tmp_path):
    path = tmp_path / "w.jsonl"
    again = Answer(key="k1", text="Lyon", uncertainty=SCORE)
    with WorkingFile(path, SETTINGS) as work:
        work.add(ANSWER)
        work.add_verdict("k1", "big@1", True)
        work.add(again)
        assert work.verdicts == {}
    with WorkingFile(path, SETTINGS) as work:
        assert (work.answers, work.verdicts) == ({"k1": again}, {})


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path, cut):
    path = tmp_path / "w.jsonl"
    with WorkingFile(path, SETTINGS) as work:
        work.add(ANSWER)
        work.add(Answer(key="k2", text="é" * 40, uncertainty=SCORE))
    path.write_bytes(path.read_bytes()[:-cut])
    with WorkingFile(path, SETTINGS) as work:
        assert list(work.answers) == ["k1"]
        work.add(Answer(key="k3", text="new"))
    with WorkingFile(path, SETTINGS) as work:
        assert list(work.answers) == ["k1", "k3"]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_other_settings_are_named(tmp_path):
    path = tmp_path / "w.jsonl"
    WorkingFile(path, SETTINGS).__exit__(None, None, None)
    with pytest.raises(WorkingFileError, match=r"temperature was 0\.0, is 1; system was None, is 'x'\. Set them"):
        WorkingFile(path, {**SETTINGS, "temperature": 1, "system": "x"})


@pytest.mark.parametrize(
    "content",
    [
        b'{"question": "q"}\n',
        b"no json\n",
        b"\xff\xfe\n",
        b"no end of line",
        b'{"gnuq_working_file": 99}\n',
        b"[]\n",
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "w.jsonl"
    path.write_bytes(content)
    with pytest.raises(WorkingFileError, match="another --working-file"):
        WorkingFile(path, SETTINGS)
    assert path.read_bytes() == content


def test_no_such_folder(tmp_path):
    with pytest.raises(WorkingFileError, match="No such file"):
        WorkingFile(tmp_path / "none" / "w.jsonl", SETTINGS)
