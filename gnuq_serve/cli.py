"""The command line: ``gnuq-serve serve | check | calibrate | demo-model``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from gnuq_serve.calibration.arguments import add_calibrate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 1 with a one-line message where it can't be done."""
    parser = argparse.ArgumentParser(prog="gnuq-serve", description="Uncertainty for served language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="vLLM's server with uncertainty on every answer",
        description="Runs `vllm serve` with the plugin on; every other argument goes to vLLM.",
    )
    serve.add_argument("--gnuq-config", metavar="FILE", help="YAML file with the settings of the scorer")
    add_calibrate(commands)
    check = commands.add_parser(
        "check",
        help="is every parameter of a model counted, and is the number autograd's?",
        description="Shows which rule counts which parameters, and compares one sample with plain autograd "
        "(three times the weights' memory). Exit status 0: every parameter is counted, the numbers equal.",
    )
    _add_check_arguments(check)
    commands.add_parser("demo-model", help="put SmolLM2-135M-Instruct into the cache and print its path")
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "serve":
            from gnuq_serve.vllm.serve import serve as serve_model

            serve_model(rest, args.gnuq_config)
        elif args.command == "calibrate":
            from gnuq_serve.calibration.command import run

            return run(args)
        elif args.command == "check":
            return _check(args)
        else:
            from gnuq_serve.demo_model import ensure_demo_model

            print(ensure_demo_model())
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"gnuq-serve: {error}", file=sys.stderr)
        return 1
    return 0


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument(
        "--dtype", default="float32", help="of the pass (default float32); auto: the checkpoint's"
    )
    parser.add_argument("--float64", action="store_true", help="strict: pass and autograd in float64")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda:1")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--mode", choices=("exact", "answer_only"), default="exact")
    parser.add_argument("--trace", action="store_true", help="compare each answer token as well")
    parser.add_argument("--semantic", action="store_true", help="compare hidden-state gradients and SemGrad too")
    parser.add_argument("--config-only", action="store_true", help="coverage alone, without loading weights")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _check(args: argparse.Namespace) -> int:
    from gnuq_serve.check import CheckOptions, check

    options = CheckOptions(
        dtype="float64" if args.float64 else args.dtype,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        mode=args.mode,
        trace=args.trace,
        semantic=args.semantic,
        config_only=args.config_only,
    )
    report = check(args.model, options)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        from gnuq_serve.check_table import show

        show(report)
    return 0 if report.problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
