import pytest

from gnuq_serve.service.proxy.proxied_model import _read_facts
from gnuq_serve.weights.checkpoint import CheckpointError


def test_what_a_models_files_say(tmp_path, llama_sizes):
    from transformers import GenerationConfig, LlamaConfig

    LlamaConfig(**llama_sizes | {"eos_token_id": 3}).save_pretrained(tmp_path)
    facts = _read_facts(str(tmp_path), None, False, {}, None)
    assert (facts.end_of_turn_ids, facts.context, facts.sampling) == ((3,), 64, {})
    GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, max_new_tokens=50, eos_token_id=[7, 3]
    ).save_pretrained(tmp_path)
    facts = _read_facts(str(tmp_path), None, False, {"max_position_embeddings": 128}, None)
    assert facts.end_of_turn_ids == (7, 3)
    assert facts.context == 128
    assert facts.sampling == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 50}


def test_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _read_facts(str(tmp_path), None, False, {}, None)


def test_the_end_of_thinking_is_looked_up_in_the_vocabulary(tmp_path, llama_sizes):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    LlamaConfig(**llama_sizes).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="--thinking-end"):
        _read_facts(str(tmp_path), None, False, {}, "</think>")
    words = Tokenizer(models.WordLevel({"?": 0, "</think>": 1, "so": 2, "then": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # it would take "</think>" apart
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    for text, ids in (("</think>", (1,)), ("so then", (2, 3))):
        assert _read_facts(str(tmp_path), None, False, {}, text).thinking_end_ids == ids
