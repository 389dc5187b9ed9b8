"""The demo model with its real weights, in the user's cache (the first run downloads and converts it)."""

import pytest

from gnuq_serve.demo_model import ensure_demo_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_dir():
    pytest.importorskip("gguf")
    return ensure_demo_model()


@pytest.fixture(scope="module")
def loaded(model_dir):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, local_files_only=True)
    return model, transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def test_weights_are_float32_and_tied(model_dir, loaded):
    import torch
    from safetensors import safe_open

    model, _ = loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


def test_special_tokens_and_settings_are_what_vllm_reads(model_dir, loaded):
    model, tokenizer = loaded
    assert not hasattr(model.config, "quantization_config")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_it_knows_the_capital_of_france(loaded):
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2  # it ends its turn by itself
