"""What is settled before an engine on a GPU starts: whose weights the scorer reads, and how much room it gets."""

from __future__ import annotations

from argparse import Namespace

from vllm.transformers_utils.repo_utils import list_filtered_repo_files

from gnuq_serve.service.settings.model import Settings
from gnuq_serve.vllm.room import leave_room, wanted_by
from gnuq_serve.vllm.weights_choice import choose


def prepare(args: Namespace, settings: Settings) -> None:
    """Have the engine share its weights where that will do, and leave room for the scorer.

    Args:
        args: the command line of ``vllm serve``; changed.
        settings: the operator's.
    """
    wanted = wanted_by(args, settings)
    against = None if wanted is None else wanted.unshareable
    if against is None and settings.scorer_weights == "auto" and _mistrals_own_names(args):
        against = "vLLM loads the checkpoint's consolidated*.safetensors, whose names are not transformers'"
    choose(args, settings, against)
    if wanted is not None:
        leave_room(args, settings, wanted)


def _mistrals_own_names(args: Namespace) -> bool:
    """Whether vLLM will choose files in Mistral's format, which some checkpoints hold beside the usual ones."""
    model, patterns = args.model_tag or args.model, ["consolidated*.safetensors"]
    return bool(list_filtered_repo_files(model, allow_patterns=patterns, revision=args.revision))
