"""What vLLM is told of us by name."""

LOAD_FORMAT = "gnuq"  # --load-format: loader.py
EXTENSION = "gnuq_serve.vllm.worker_extension.GnuqWorkerExtension"  # --worker-extension-cls
# --logprobs-mode: those that are of probabilities, with which a scorer's reading of the weights can be checked
LOGPROBS_MODES = "raw_logprobs", "processed_logprobs"
