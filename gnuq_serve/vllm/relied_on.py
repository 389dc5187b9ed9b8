"""The parts of vLLM that we use without a promise that they stay, for `compatibility` to look up."""

from __future__ import annotations

# Versions that the end-to-end tests have passed with.
TESTED = ("0.32",)

_CHAT = "vllm.entrypoints.openai.chat_completion.protocol"
_COMPLETION = "vllm.entrypoints.openai.completion.protocol"
# Module and class -> fields that we read, write or ask for.
FIELDS = {
    (_CHAT, "ChatCompletionRequest"): "messages model logprobs top_logprobs return_token_ids include_reasoning "
    "chat_template_kwargs response_format structured_outputs tools tool_choice n stream",
    (_CHAT, "ChatCompletionResponse"): "choices prompt_token_ids",
    (_CHAT, "ChatCompletionResponseChoice"): "index message logprobs finish_reason token_ids",
    (_CHAT, "ChatCompletionStreamResponse"): "id object created model choices prompt_token_ids",
    (_CHAT, "ChatCompletionResponseStreamChoice"): "index delta logprobs finish_reason token_ids",
    (_COMPLETION, "CompletionRequest"): "prompt model logprobs return_token_ids echo n max_tokens prompt_embeds "
    "truncate_prompt_tokens",
    (_COMPLETION, "CompletionResponseChoice"): "index text logprobs finish_reason token_ids prompt_token_ids",
    (_COMPLETION, "CompletionResponseStreamChoice"): "index text logprobs finish_reason token_ids "
    "prompt_token_ids",
    ("vllm.entrypoints.serve.tokenize.protocol", "TokenizeChatRequest"): "model messages add_generation_prompt "
    "tools chat_template chat_template_kwargs",
    ("vllm.entrypoints.serve.tokenize.protocol", "TokenizeCompletionRequest"): "model prompt add_special_tokens",
}
# Module and class -> attributes that we read.
ATTRIBUTES = {
    ("vllm.config", "ModelConfig"): "model dtype revision trust_remote_code hf_overrides logprobs_mode hf_config "
    "try_get_generation_config quantization get_vocab_size max_model_len",
    ("vllm.config", "ParallelConfig"): "world_size",
    ("vllm.v1.engine.async_llm", "AsyncLLM"): "model_config vllm_config get_supported_tasks "
    "is_tracing_enabled collective_rpc generate",
    ("vllm.v1.worker.gpu_worker", "Worker"): "model_runner model_config vllm_config reload_weights "
    "update_weights finish_weight_update",
    ("vllm.model_executor.model_loader", "DefaultModelLoader"): "load_model load_weights get_all_weights",
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat"): "parser_cls renderer model_config "
    "default_chat_template_kwargs default_sampling_params",
    ("vllm.entrypoints.openai.models.serving", "OpenAIServingModels"): "lora_requests",
    ("vllm.reasoning", "ReasoningParser"): "extract_content_ids is_reasoning_end",
    ("vllm.outputs", "CompletionOutput"): "token_ids logprobs cumulative_logprob",
}
FLAGS = "uds host port api_key middleware otlp_traces_endpoint logprobs_mode disable_log_stats load_format "
FLAGS += "worker_extension_cls model model_tag dtype revision trust_remote_code hf_overrides "
FLAGS += "tensor_parallel_size pipeline_parallel_size gpu_memory_utilization kv_cache_memory_bytes"
# What opens all the routes that vLLM's server can have: flags and variables.
ALL_ROUTES = ("--enable-scale-out", "--enable-fault-tolerance")
ALL_ROUTES_VARIABLES = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_ENABLE_COHERE_API": "1",
}
# Words that vLLM's sources must hold -> where.
SOURCES = {
    "vllm:num_requests_waiting": "vllm.v1.metrics.loggers",
    "state.openai_serving_chat =": "vllm.entrypoints.generate.api_router",
    "state.openai_serving_models =": "vllm.entrypoints.launchers.api_server.app_state",
    "set_tracer_provider(": "vllm.tracing.otel",
    '"vllm.general_plugins"': "vllm.plugins",
    "from vllm.entrypoints.launchers.grpc_server import": "vllm.entrypoints.cli.serve",
    "VLLM_USE_RUST_FRONTEND": "vllm.envs",
    '"_cpu_skip_gemm_dispatch"': "vllm.model_executor.layers.linear",
}
