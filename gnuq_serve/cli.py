"""The command line: ``gnuq-serve serve | proxy | calibrate | recalibrate | evaluate | check | …``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from gnuq_serve.calibration.arguments import add_calibrate
from gnuq_serve.evaluation.arguments import add_evaluate
from gnuq_serve.service.operator.recalibrate_command import add_recalibrate
from gnuq_serve.service.proxy.command import add_proxy
from gnuq_serve.service.settings.model import Settings
from gnuq_serve.service.settings.sources import add_flags, flags_of, unknown_flag
from gnuq_serve.validation.arguments import add_validate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; 1 with a one-line message where it can't be done."""
    parser = argparse.ArgumentParser(prog="gnuq-serve", description="Uncertainty for served language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="vLLM's server with uncertainty on every answer",
        usage="gnuq-serve serve MODEL [--gnuq-SETTING VALUE ...] [any flag of `vllm serve`]",
        description="Runs `vllm serve` with the plugin on. Flags that begin with --gnuq- are ours, explained "
        "here; every other argument goes to vLLM.",
        epilog="vLLM's flags: `gnuq-serve serve --help=all` shows all of them, --help=listgroup their groups, "
        "--help=WORD those that hold the word.",
        allow_abbrev=False,
    )
    add_flags(serve, Settings)
    add_proxy(commands)
    add_calibrate(commands)
    add_recalibrate(commands)
    add_evaluate(commands)
    add_validate(commands)
    check = commands.add_parser(
        "check",
        help="is every parameter of a model counted, and is the number autograd's?",
        description="Shows which rule counts which parameters, and compares one sample with plain autograd "
        "(three times the weights' memory). Exit status 0: every parameter is counted, the numbers equal.",
    )
    _add_check_arguments(check)
    commands.add_parser(
        "check-vllm",
        help="does the installed vLLM have all that we rely on?",
        description="Builds vLLM's own application with the plugin and looks up each part of vLLM that we use, "
        "without loading a model (20 s). Exit status 0: all is there.",
    )
    commands.add_parser("demo-model", help="put SmolLM2-135M-Instruct into the cache and print its path")
    argv = sys.argv[1:] if argv is None else argv
    vllm_help = [argument for argument in argv if argument.startswith("--help=")]
    args, rest = parser.parse_known_args([argument for argument in argv if argument not in vllm_help])
    rest += vllm_help
    if complaint := unknown_flag(Settings, rest):
        parser.error(complaint)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "serve":
            from gnuq_serve.vllm.serve import serve as serve_model

            serve_model(rest, args.gnuq_config, flags_of(args))
        elif args.command == "proxy":
            from gnuq_serve.service.proxy.command import run as run_proxy

            return run_proxy(args)
        elif args.command == "calibrate":
            from gnuq_serve.calibration.command import run

            return run(args)
        elif args.command == "recalibrate":
            from gnuq_serve.service.operator.recalibrate_command import run as recalibrate

            return recalibrate(args)
        elif args.command == "evaluate":
            from gnuq_serve.evaluation.command import run as evaluate

            return evaluate(args)
        elif args.command == "validate":
            from gnuq_serve.validation.command import run as validate

            return validate(args)
        elif args.command == "check":
            return _check(args)
        elif args.command == "check-vllm":
            return _check_vllm()
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


def _check_vllm() -> int:
    from gnuq_serve.vllm.compatibility import check_vllm

    problems = 0
    for finding in check_vllm():
        problems += finding.problem is not None
        print("ok  " if finding.problem is None else "NO  ", finding.what, end="")
        print("" if finding.problem is None else f": {finding.problem}", flush=True)
    return int(problems > 0)


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
