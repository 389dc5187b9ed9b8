"""What vLLM is told of us by name."""

LOAD_FORMAT = "gnuq"  # --load-format: loader.py
EXTENSION = "gnuq_serve.vllm.worker_extension.GnuqWorkerExtension"  # --worker-extension-cls
