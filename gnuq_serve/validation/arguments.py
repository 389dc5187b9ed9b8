"""The arguments of ``gnuq-serve validate``; imports nothing heavy, so that ``--help`` is quick."""

from __future__ import annotations

import argparse

from gnuq_serve.calibration.arguments import positive

_SYNTHETIC = """\
Small networks are trained on data whose probabilities are known; NUTS samples their posterior. How well does the
squared gradient norm follow the posterior variance of p, and p(1-p) the expected Bernoulli variance, as networks
grow, for inputs like the training data and for inputs far from it? Runs whose predictions have not converged are
refused, and listed. A stopped run goes on from where it was."""

_COVARIANCE = """\
The same first-order estimate under other covariances of the weights (diagonal, K-FAC, full), built from the
training data and from other data, against NUTS on the runs of `validate synthetic` (taken from the same --out
where they are there); with --model, also by AUROC on a language model's answers."""


def add_validate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``validate`` and its two experiments."""
    parser = commands.add_parser("validate", help="the method against references: NUTS, other covariances")
    experiments = parser.add_subparsers(dest="experiment", required=True)
    for name, text in (("synthetic", _SYNTHETIC), ("covariance", _COVARIANCE)):
        one = experiments.add_parser(
            name,
            help=text.split(".")[0].split(":")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_runs(one)
        if name == "covariance":
            _add_language_model(one)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="results, figures, and the runs so far")
    parser.add_argument("--quick", action="store_true", help="two problems, small networks: a few minutes")
    parser.add_argument("--jobs", type=positive, default=2, metavar="N", help="runs at a time, a core each (2)")
    parser.add_argument(
        "--problems", nargs="+", metavar="NAME", help="of linear, waves, rings, three_classes (all)"
    )
    parser.add_argument("--widths", nargs="+", type=positive, metavar="N", help="of both hidden layers (2 to 64)")
    parser.add_argument("--seeds", type=positive, metavar="N", help="data sets and trainings of each (3)")
    parser.add_argument("--train", type=positive, metavar="N", help="training points (100)")
    parser.add_argument("--draws", type=positive, metavar="N", help="NUTS draws of each of four chains (300)")
    parser.add_argument(
        "--prior",
        choices=("unit", "fan_in"),
        default="unit",
        help="variance of the weights' Gaussian prior, which is also the weight decay: 1 for all, or 1/fan-in",
    )
    parser.add_argument("--max-rhat", type=float, default=1.05, help="of any prediction, else refused (1.05)")
    parser.add_argument("--min-ess", type=float, default=100.0, help="of any prediction, else refused (100)")


def _add_language_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("language model")
    model.add_argument("--model", metavar="PATH", help="a causal language model: folder or hub name")
    model.add_argument(
        "--evaluation", metavar="DIR", help="its answers: --out of a finished `gnuq-serve evaluate`"
    )
    model.add_argument("--limit", type=positive, default=150, metavar="N", help="answers of each set (150)")
    model.add_argument("--texts", type=positive, default=128, metavar="N", help="for each covariance (128)")
