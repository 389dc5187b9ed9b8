"""What all tests share: one torch thread, the demo model, tiny random models with nothing trivial in them."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models.sizes import SIZES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is imported only if such a test was collected."""
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _log_level_stays() -> Iterator[None]:
    """Some of what vLLM imports sets the root logger's level: the next test file must see our warnings again."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture
def in_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in ``tmp_path``, and ask servers of this machine directly."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, made on first use."""
    from gnuq_serve.demo_model import ensure_demo_model

    return ensure_demo_model()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """``tiny_model(config, dtype=float64, seed=0)``: a random causal language model in eval mode.

    Every parameter is moved by ``0.1 randn``, so that biases are not zero, norm weights are not one and the
    pad token's row is not empty.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def build(config: Any, dtype: Any = torch.float64, seed: int = 0) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def llama_sizes() -> dict[str, Any]:
    """The settings of a tiny Llama, which its relatives take as well."""
    return dict(LLAMA_SIZES)


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """``tiny_llama(tied, attention_bias, dtype)``; pad token 5, context 64, other settings by keyword."""
    import torch
    from transformers import LlamaConfig

    def build(
        tied: bool = False,
        attention_bias: bool = False,
        dtype: Any = torch.float64,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Any:
        config = LlamaConfig(
            **{
                **LLAMA_SIZES,
                "attention_bias": attention_bias,
                "mlp_bias": attention_bias,
                "tie_word_embeddings": tied,
                **settings,
            }
        )
        return tiny_model(config, dtype, seed)

    return build


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """``tiny_gpt2(tied, dtype)``; dropout as GPT-2 has it, 0.1."""
    import torch
    from transformers import GPT2Config

    def build(tied: bool = True, dtype: Any = torch.float64, *, seed: int = 0, **settings: Any) -> Any:
        config = GPT2Config(
            **{
                "vocab_size": 97,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 5,
                "tie_word_embeddings": tied,
                **settings,
            }
        )
        return tiny_model(config, dtype, seed)

    return build


LLAMA_SIZES: dict[str, Any] = {**SIZES, "intermediate_size": 56}
