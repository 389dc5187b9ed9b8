"""The arguments of ``gnuq-serve calibrate``; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

import argparse

DESCRIPTION = """\
From labelled questions to a decision with a guarantee: answers each question with the served model, marks it
right or wrong, fits the probability of being correct, and finds the loosest threshold that keeps the share of
errors among answered questions under --max-error with the asked confidence.

Exit codes: 0 a threshold for every level; 3 none for at least one of them (the file is written all the same, with
what the data does support); 1 it can't be done, with the reason."""

EXIT_NO_PROMISE = 3
EXIT_STOPPED = 130  # as a shell says of a command that Ctrl-C ended


def add_calibrate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``calibrate``."""
    parser = commands.add_parser(
        "calibrate",
        help="from labelled questions to a decision with a guarantee",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="JSON Lines, or CSV if the name ends in .csv. Rows: question and answers (or choices and label); "
        "question, answer and correct; or uncertainty and correct (no model is asked)",
    )
    data.add_argument("--group", metavar="COLUMN", help="rows that agree here are split together (conversations)")
    data.add_argument("--limit", type=positive, metavar="N", help="a random N of the rows")
    data.add_argument("--seed", type=int, default=0, help="of choices' order, --limit and splits (0)")

    answers = parser.add_argument_group("answers")
    where = answers.add_mutually_exclusive_group()
    where.add_argument("--server", metavar="URL", help="a server started with `gnuq-serve serve`")
    where.add_argument("--model", metavar="PATH", help="or a model that vLLM loads in this process")
    answers.add_argument("--served-model", metavar="NAME", help="the server's model, where it has several")
    answers.add_argument("--api-key", metavar="KEY", help="the server's key (default: OPENAI_API_KEY)")
    answers.add_argument("--concurrency", type=positive, default=8, metavar="N", help="questions under way (8)")
    answers.add_argument("--temperature", type=float, default=0.0, help="as in production (0)")
    answers.add_argument("--top-p", type=float, default=1.0, help="as in production (1)")
    answers.add_argument("--max-tokens", type=positive, default=256, help="longest answer (256)")
    answers.add_argument("--system", metavar="TEXT", help="system prompt, for questions that have none")
    answers.add_argument("--mode", choices=("exact", "answer_only"), help="how the server scores")
    answers.add_argument("--semantic", action="store_true", help="ask the server for SemGrad and HybridGrad too")
    answers.add_argument("--request", metavar="JSON", help="further fields of the request to the server")
    answers.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --model: an argument of vllm.LLM, such as dtype=float32; repeatable",
    )
    answers.add_argument(
        "--working-file",
        metavar="FILE",
        help="answers and scores as they come, text included; a killed run goes on from there "
        "(default: beside --out, ending in .work.jsonl)",
    )

    right = parser.add_argument_group("right or wrong")
    right.add_argument(
        "--match",
        choices=("exact", "contains", "choice", "number", "judge"),
        default="contains",
        help="how an answer is compared with its references (contains)",
    )
    right.add_argument("--choice-prompt", metavar="TEXT", help="with choice: holds {question} and {choices}")
    right.add_argument("--judge-server", metavar="URL", help="with judge: an OpenAI-compatible API")
    right.add_argument("--judge-model", metavar="NAME", help="with judge: the judge's name there")
    right.add_argument("--judge-prompt", metavar="FILE", help="with judge: an instruction that holds {case}")
    right.add_argument(
        "--judge-sample",
        metavar="FILE",
        help="with judge: rows with question, answers, answer and correct, labelled by a person; its error is "
        "measured on them",
    )

    add_promise(parser)
    add_output(parser).add_argument("--collect-only", action="store_true", help="stop after --rows")


def add_promise(parser: argparse.ArgumentParser) -> None:
    """What is to be promised."""
    promise = parser.add_argument_group("promise")
    promise.add_argument(
        "--max-error",
        type=float,
        nargs="+",
        default=[0.1],
        metavar="SHARE",
        help="largest share of errors among answered questions; several levels can be named (0.1)",
    )
    promise.add_argument("--confidence", type=float, default=0.95, help="that the promise holds (0.95)")
    promise.add_argument("--held-out", type=float, metavar="SHARE", help="share of rows kept from the fit (half)")


def add_output(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What is to be written."""
    out = parser.add_argument_group("output")
    out.add_argument("--out", default="calibration.json", metavar="FILE", help="the result (calibration.json)")
    out.add_argument("--name", metavar="NAME", help="its name (default: that of --out)")
    out.add_argument(
        "--report",
        metavar="DIR",
        help="report.html and its figures; holds the text of twenty questions and answers",
    )
    out.add_argument("--rows", metavar="FILE", help="also write the scored, labelled rows, without any text")
    return out


def positive(text: str) -> int:
    """A whole number, at least 1.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text!r}")
    return int(text)
