"""The command line: ``gnuq-serve serve | calibrate | demo-model``."""

from __future__ import annotations

import argparse
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
        else:
            from gnuq_serve.demo_model import ensure_demo_model

            print(ensure_demo_model())
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"gnuq-serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
