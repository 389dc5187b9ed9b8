"""``gnuq-serve recalibrate``: a new calibration from the labels of a server's audit."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnuq_serve.calibration.arguments import add_output, add_promise

if TYPE_CHECKING:
    from gnuq_serve.calibration.labelling import Labelled
    from gnuq_serve.calibration.row_reader import Record

DESCRIPTION = """\
A new calibration from the answers that a server drew for its audit (audit_fraction) and that were labelled. They
are a random sample of what it serves, so the promise is about that. Labels that users volunteered are left out:
they are no random sample.

Exit codes: as of `gnuq-serve calibrate`."""


def add_recalibrate(commands: Any) -> None:
    """Add the command ``recalibrate`` to an argparse subparser collection."""
    parser = commands.add_parser(
        "recalibrate",
        help="a new calibration from the labels of a server's audit",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--labels", metavar="FILE", help="the server's labels (labels_path)")
    data.add_argument(
        "--log",
        nargs="+",
        default=[],
        metavar="FILE",
        help="its logs of scores, rotated ones too: for labels written into `correct` by hand, and for the text "
        "in the report",
    )
    data.add_argument(
        "--earlier",
        nargs="+",
        default=[],
        metavar="FILE",
        help="labelled rows of earlier calibrations (`calibrate --rows`): fitted on, never used for the promise",
    )
    data.add_argument("--seed", type=int, default=0, help="of the split (0)")
    add_promise(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError: the arguments or the data can't be used.
        LabelStoreError: the labels can't be read.
        ImportError: an extra is missing.
    """
    from gnuq_serve.calibration.answers import Sampling
    from gnuq_serve.calibration.collecting import fingerprint_parts
    from gnuq_serve.calibration.command import check_packages, check_promise, conclude, say_left_out
    from gnuq_serve.calibration.labelling import write_rows
    from gnuq_serve.calibration.progress import say
    from gnuq_serve.calibration.row_reader import DataError, read_rows

    if not args.labels and not args.log:
        raise ValueError(
            "name the server's labels with --labels FILE, or a log with labels in it with --log FILE"
        )
    check_promise(args)
    check_packages(["scipy", "sklearn", *(["matplotlib", "jinja2"] if args.report else [])])
    audited, volunteered = audited_rows(args.labels, args.log)
    if not audited:
        raise DataError(
            "no answer of an audit has a label: set audit_fraction, and post labels to "
            "/v1/uncertainty/{id}/feedback, or write them into `correct` of the log"
        )
    newest = audited[-1]
    labelled = _labelled(audited, newest)
    say(f"{len(labelled.rows)} labelled answers of the audit")
    if volunteered:
        say(f"  {volunteered} volunteered labels left out: they are no random sample")
    say_left_out(labelled)
    parts = fingerprint_parts(Sampling(), labelled.questions)
    if args.earlier:
        earlier = _labelled([row for path in args.earlier for row in read_rows(Path(path))], newest)
        say(f"{len(earlier.rows)} earlier rows, for the fit alone")
        say_left_out(earlier)
        labelled.rows += [dataclasses.replace(row, fit_only=True) for row in earlier.rows]
        labelled.questions += earlier.questions
        labelled.texts += earlier.texts
    if args.rows:
        write_rows(args.rows, labelled.rows)
        say(f"wrote {args.rows}: {len(labelled.rows)} rows, no text")
    return conclude(args, labelled, parts)


def audited_rows(labels: str | None, logs: Sequence[str]) -> tuple[list[Record], int]:
    """Labelled answers of the audit, the newest last, and how many labels were volunteered instead.

    Args:
        labels: file of a server's labels.
        logs: its logs of scores.

    Raises:
        LabelStoreError: the labels can't be read.
        DataError: a log can't be read.
    """
    from gnuq_serve.calibration.row_reader import Record, read_rows
    from gnuq_serve.service.operator.label_store import read_labels

    logged = {str(row.row.get("id")): row for path in logs for row in read_rows(Path(path))}
    found: dict[str, Record] = {}
    volunteered = 0
    for number, answer in enumerate(read_labels(Path(labels)) if labels else [], start=1):
        volunteered += not answer.audit
        if answer.audit and (row := {**answer.row, **_row(logged.get(answer.id))}):
            found[answer.id] = Record(Path(str(labels)), number, {**row, "correct": answer.correct})
    for answer_id, record in logged.items():
        if record.row.get("correct") is not None and answer_id not in found:
            drawn = bool((record.row.get("uncertainty") or {}).get("audit"))
            volunteered += not drawn
            if drawn:
                found[answer_id] = record
    return sorted(found.values(), key=lambda record: str(record.row.get("time"))), volunteered


def _row(record: Record | None) -> Mapping[str, Any]:
    return {} if record is None else record.row


def _labelled(records: Sequence[Record], newest: Record) -> Labelled:
    """Rows of the newest answer's kind: scored by the same model in the same way."""
    from gnuq_serve.calibration.artefact import parts_of
    from gnuq_serve.calibration.labelling import label
    from gnuq_serve.calibration.questions import questions_of
    from gnuq_serve.matching import get_matcher

    (pattern,) = questions_of([newest])
    questions = questions_of(records)
    wanted = None if pattern.uncertainty is None else parts_of(pattern.uncertainty)
    same = [one for one in questions if one.uncertainty is not None and parts_of(one.uncertainty) == wanted]
    labelled = label(same, {}, get_matcher("contains"), progress=lambda *_: lambda: None)
    for _ in range(len(questions) - len(same)):
        labelled.leave_out("scored by another model or in another mode than the newest answer")
    return labelled
