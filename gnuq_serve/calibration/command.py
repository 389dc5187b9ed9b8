"""``gnuq-serve calibrate``: questions in; answers, labels, a fit, a promise and a report out."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnuq_serve.calibration.answers import AnswerError, AnswerSource, Sampling
from gnuq_serve.calibration.arguments import EXIT_NO_PROMISE, EXIT_STOPPED
from gnuq_serve.calibration.collecting import (
    collect,
    fingerprint_parts,
    needs_answer,
    sample,
    without_repeats,
)
from gnuq_serve.calibration.judging import JUDGE_NOT_MEASURED, judge_all, judge_quality
from gnuq_serve.calibration.labelling import Labelled, check_references, label, write_rows
from gnuq_serve.calibration.progress import progress_bar, say
from gnuq_serve.calibration.questions import CHOICE_PROMPT, Question, read_questions
from gnuq_serve.calibration.row_reader import DataError
from gnuq_serve.calibration.working_file import WorkingFile
from gnuq_serve.matching import JUDGE_PROMPT, Judge, Matcher, get_matcher

if TYPE_CHECKING:
    from gnuq_serve.calibration import Outcome


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError: the arguments or the data can't be used (`DataError`, `WorkingFileError` among them).
        AnswerError: the model's or the judge's server is gone.
        ImportError: an extra is missing.
    """
    _check(args)
    _check_installed(args)
    questions = read_questions(
        args.data,
        group=args.group,
        seed=args.seed,
        system=args.system,
        choice_prompt=args.choice_prompt or CHOICE_PROMPT,
        show_choices=args.match == "choice",
    )
    with ExitStack() as stack:
        match = _matcher(args, stack)
        check_references(questions, get_matcher("contains") if isinstance(match, Judge) else match)
        questions = sample(questions, args.limit, args.seed)
        unique = without_repeats(questions)
        if len(unique) < len(questions):
            say(f"{len(questions) - len(unique)} questions stand in the data twice; each counts once")
        judge = _judge_sentence(args, match)
        try:
            labelled = _labelled(args, unique, match, stack)
        except KeyboardInterrupt:
            say("stopped; the same command goes on from here")
            return EXIT_STOPPED
    say(f"{len(labelled.rows)} of {len(unique)} questions gave a scored and labelled answer")
    say_left_out(labelled)
    if args.rows:
        write_rows(args.rows, labelled.rows)
        say(f"wrote {args.rows}: {len(labelled.rows)} rows, no text")
    if args.collect_only:
        if judge:
            say(judge)
        return 0
    parts = fingerprint_parts(_sampling(args), labelled.questions, _json_object("--request", args.request))
    return conclude(args, labelled, parts, judge)


def _check(args: argparse.Namespace) -> None:
    if args.collect_only and not args.rows:
        raise ValueError("--collect-only needs --rows FILE: where the rows go")
    if args.match == "judge" and not args.judge_model:
        raise ValueError("--match judge needs --judge-model NAME (and --judge-server URL, unless it is OpenAI's)")
    if args.judge_sample and args.match != "judge":
        raise ValueError("--judge-sample measures a judge; it goes with --match judge")
    if args.engine_arg and not args.model:
        raise ValueError("--engine-arg goes with --model")
    if not args.server and (args.mode or args.semantic or args.request or args.served_model):
        raise ValueError("--mode, --semantic, --request and --served-model go with --server")
    check_promise(args)
    if args.working_file and not Path(args.working_file).parent.is_dir():
        raise ValueError(f"{args.working_file}: there is no folder {Path(args.working_file).parent}")


def check_promise(args: argparse.Namespace) -> None:
    """Complain about what is to be promised and written before any work is done.

    Raises:
        ValueError: a share out of range, or a folder that is not there.
    """
    for level in args.max_error:
        if not 0 < level < 1:
            raise ValueError(f"--max-error {level:g} must be a share between 0 and 1, such as 0.1 for 10 %")
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence {args.confidence:g} must be a share between 0 and 1, such as 0.95")
    for path in (args.out, args.rows):
        if path and not Path(path).parent.is_dir():
            raise ValueError(f"{path}: there is no folder {Path(path).parent}")


def _check_installed(args: argparse.Namespace) -> None:
    """Said before hours are spent on answers."""
    wanted = ["tqdm"]
    wanted += ["openai"] if args.server or args.match == "judge" else []
    wanted += ["scipy"] if args.judge_sample else []
    wanted += [] if args.collect_only else ["scipy", "sklearn"]
    wanted += ["matplotlib", "jinja2"] if args.report and not args.collect_only else []
    check_packages(wanted)


def check_packages(wanted: Sequence[str], extra: str = "calibrate") -> None:
    """Raise ImportError with the remedy where a package is not installed; ``extra``: what brings it."""
    missing = [name for name in dict.fromkeys(wanted) if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"this needs {', '.join(missing)}, not installed here: pip install 'gnuq-serve[{extra}]'"
        )


def _matcher(args: argparse.Namespace, stack: ExitStack) -> Matcher:
    if args.match != "judge":
        return get_matcher(args.match)
    import openai

    prompt = JUDGE_PROMPT
    if args.judge_prompt:
        try:
            prompt = Path(args.judge_prompt).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--judge-prompt {args.judge_prompt}: {error.strerror}") from error
    key = os.environ.get("GNUQ_JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY")
    client = openai.OpenAI(base_url=_v1(args.judge_server), api_key=key or "none", max_retries=6)
    return Judge(stack.enter_context(client), args.judge_model, prompt=prompt)


def _v1(url: str | None) -> str | None:
    return None if url is None else url.rstrip("/").removesuffix("/v1") + "/v1"


def _judge_sentence(args: argparse.Namespace, match: Matcher) -> str | None:
    """What is known of the judge's own error; None where there is no judge."""
    if not isinstance(match, Judge):
        return None
    if not args.judge_sample:
        return JUDGE_NOT_MEASURED
    sample_rows = read_questions(args.judge_sample)
    for row in sample_rows:
        if row.answer is None or row.correct is None or not row.reference.answers:
            where = f"{row.path}, line {row.line}"
            raise DataError(f"{where}: a judge's sample needs `answers`, `answer` and `correct`")
    step = progress_bar("judge's sample", 0, len(sample_rows))
    pairs: list[tuple[bool, bool]] = []

    def keep(index: int, verdict: bool | None) -> None:
        if verdict is not None:
            pairs.append((verdict, bool(sample_rows[index].correct)))
        step()

    with _judge_errors():
        cases = [(row.answer or "", row.reference) for row in sample_rows]
        judge_all(match, cases, concurrency=args.concurrency, on_verdict=keep)
    return judge_quality(pairs).sentence(args.confidence)


class _judge_errors:  # noqa: N801
    """Turns the client's errors into one that says what to do.

    A class, since a type checker takes it that a generator's context manager may swallow errors.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and type(error).__module__.startswith("openai"):
            what = "check --judge-server and --judge-model, then run the same command again"
            raise AnswerError(f"the judge: {str(error)[:400]}; {what}") from error


def _source(args: argparse.Namespace, questions: list[Question]) -> AnswerSource | None:
    lacking = sum(map(needs_answer, questions))
    if not lacking:
        return None
    sampling = _sampling(args)
    if args.server:
        from gnuq_serve.calibration.server_source import ServerSource

        options: dict[str, Any] = {"mode": args.mode} if args.mode else {}
        if args.semantic:
            options["semantic"] = True
        return ServerSource(
            args.server,
            sampling=sampling,
            model=args.served_model,
            api_key=args.api_key,
            options=options,
            request=_json_object("--request", args.request),
            concurrency=args.concurrency,
        )
    if args.model:
        from gnuq_serve.calibration.model_source import ModelSource

        return ModelSource(args.model, sampling=sampling, engine=_engine(args.engine_arg))
    raise ValueError(
        f"{lacking} of {len(questions)} rows carry no `uncertainty`: name a model with --server URL or "
        "--model PATH"
    )


def _sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens)


def _json_object(name: str, text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, such as '{{\"seed\": 1}}'")
    return value


def _engine(pairs: list[str]) -> dict[str, Any]:
    import yaml

    engine = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--engine-arg {pair}: write NAME=VALUE, such as dtype=float32")
        engine[name.replace("-", "_")] = yaml.safe_load(value)
    return engine


def _labelled(args: argparse.Namespace, questions: list[Question], match: Matcher, stack: ExitStack) -> Labelled:
    source = _source(args, questions)
    work = None
    if source is not None:
        path = args.working_file or str(Path(args.out).with_suffix("")) + ".work.jsonl"
        work = stack.enter_context(WorkingFile(path, source.settings))
        say(f"working file {path}: {len(work.answers)} answers so far; it holds their text")
        known = {question.key for question in questions}
        if changed := sum(key not in known for key in work.answers):
            say(f"{changed} of them belong to no question of this run (changed, removed or beyond --limit)")
        stack.callback(source.close)
    answers = collect(questions, source, work, progress_bar)
    with _judge_errors():
        return label(questions, answers, match, work=work, progress=progress_bar, concurrency=args.concurrency)


def conclude(
    args: argparse.Namespace, labelled: Labelled, fingerprint: Mapping[str, str], judge: str | None = None
) -> int:
    """Fit, write what was asked for, and print the result; returns the exit code.

    Args:
        args: the arguments of `add_promise` and `add_output`, and ``seed``.
        labelled: rows and what did not become one.
        fingerprint: what the calibration is bound to besides the rows' own.
        judge: what is known of the judge's error.

    Raises:
        ValueError: the rows can't be used together, or are too few.
    """
    from gnuq_serve.calibration import calibrate

    outcome = calibrate(
        labelled.rows,
        max_error=tuple(args.max_error),
        confidence=args.confidence,
        name=args.name or Path(args.out).name.removesuffix(".json"),
        fingerprint=fingerprint,
        seed=args.seed,
        held_out=args.held_out,
        progress=say,
    )
    outcome.calibration.save(args.out)
    say(f"wrote {args.out}")
    if args.report:
        from gnuq_serve.calibration.report import write_report

        page = write_report(args.report, outcome, labelled, judge=judge)
        say(f"wrote {page}; it holds the text of questions and answers")
    for line in summary(outcome, judge):
        print(line)
    return 0 if outcome.kept else EXIT_NO_PROMISE


def summary(outcome: Outcome, judge: str | None = None) -> list[str]:
    """The result in plain words, the last line for those who read only one."""
    promises = outcome.guarantee.promises
    quality = outcome.quality
    auroc, skill = quality.auroc, quality.brier_skill
    numbers = [f"ECE {quality.ece:.3f}"]
    if skill is not None:
        numbers.append(f"Brier skill {skill:.2f}")
    if auroc.value is not None:
        between = "" if auroc.low is None else f" ({auroc.low:.2f} to {auroc.high:.2f})"
        numbers.insert(0, f"AUROC {auroc.value:.2f}{between}")
    lines = [f"{quality.count} held-out answers, {quality.accuracy:.1%} right; p_correct: {', '.join(numbers)}"]
    lines += [*outcome.notes, *([judge] if judge else [])]
    if len(promises) == 1:
        return [*lines, f"{promises[0].sentence} {outcome.verdict.sentence}"]
    lines += [promise.sentence for promise in promises]
    found = [f"{promise.max_error:.3g}" for promise in promises if promise.threshold is not None]
    missing = [f"{promise.max_error:.3g}" for promise in promises if promise.threshold is None]
    parts = [f"A threshold keeps errors under {', '.join(found)}."] if found else []
    parts += [f"None reaches {', '.join(missing)}."] if missing else []
    return [*lines, " ".join([*parts, outcome.verdict.sentence])]


def say_left_out(labelled: Labelled) -> None:
    """Tell why rows are missing."""
    for reason, count in sorted(labelled.left_out.items(), key=lambda item: -item[1])[:5]:
        say(f"  {count} left out ({reason[:200]})")
