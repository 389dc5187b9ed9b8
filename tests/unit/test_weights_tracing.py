"""A Llama loaded by an engine that fuses, pads and transposes: read back from the engine's memory."""

from pathlib import Path

import pytest
import torch
from fused_engine import PADDING, FusedEngine
from tiny_families import PROMPT, tiny

from gnuq_serve.weights.assemble import assemble
from gnuq_serve.weights.layout import Layout
from gnuq_serve.weights.shared_file import MappedFile, SharedFile
from gnuq_serve.weights.sharing import share
from gnuq_serve.weights.source import SourceRefused
from gnuq_serve.weights.tracing import CopyRecorder


@pytest.fixture
def checkpoint():
    return tiny("llama", tied=True, dtype=torch.float32)


def load(engine, tensors, after=lambda engine: None):
    recorder = CopyRecorder()
    with recorder:
        engine.load_weights(recorder.watched(tensors.items()))
    recorder.loaded(engine.tensors())
    after(engine)
    return recorder.layout(engine.tensors())


def tensors_of(checkpoint):
    """As safetensors gives them, each with memory of its own; a tied head is not among them."""
    return {name: t.detach().clone() for name, t in checkpoint.named_parameters()}


def same(model, checkpoint):
    expected = dict(checkpoint.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    for name, buffer in checkpoint.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, checkpoint(input_ids=ids).logits)


def test_every_tensor_is_a_view_of_the_engine(checkpoint):
    engine = FusedEngine(checkpoint.config)
    layout, storages = load(engine, tensors_of(checkpoint))
    assert layout.untraced == {}
    model = assemble(checkpoint.config, layout.on(storages), dtype=torch.float32)
    same(model, checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    engines = {tensor.untyped_storage().data_ptr() for tensor in engine.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} == engines
    assert engine.embed_tokens[-PADDING:].isnan().all()  # and nothing was written


def test_another_dtype_is_cast_by_the_engines_copy(checkpoint):
    halves = {name: tensor.bfloat16() for name, tensor in tensors_of(checkpoint).items()}
    layout, storages = load(FusedEngine(checkpoint.config), halves)
    model = assemble(checkpoint.config, layout.on(storages), dtype=torch.float32)
    with torch.no_grad():
        for parameter in checkpoint.parameters():
            parameter.copy_(parameter.bfloat16())
    same(model, checkpoint)


def test_tensors_of_one_file_share_a_storage(checkpoint):
    """Mapped files have one storage for all their tensors."""
    tensors = tensors_of(checkpoint)
    file = torch.cat([tensor.flatten() for tensor in tensors.values()])
    mapped, start = {}, 0
    for name, tensor in tensors.items():
        mapped[name] = file[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    layout, storages = load(FusedEngine(checkpoint.config), mapped)
    same(assemble(checkpoint.config, layout.on(storages), dtype=torch.float32), checkpoint)


def test_memory_used_again_is_not_mistaken(checkpoint):
    """Checkpoint tensors are freed as loading goes on, and their memory is given to others."""
    fresh = ((name, t.detach().clone()) for name, t in checkpoint.named_parameters())
    engine, recorder = FusedEngine(checkpoint.config), CopyRecorder()
    with recorder:
        for item in recorder.watched(fresh):
            engine.load_weights([item])
            del item
    layout, storages = recorder.layout(engine.tensors())
    same(assemble(checkpoint.config, layout.on(storages), dtype=torch.float32), checkpoint)


NORM = "model.layers.1.input_layernorm.weight"


class Adding(FusedEngine):
    def load_weights(self, weights):
        super().load_weights((name, tensor + 1 if name == NORM else tensor) for name, tensor in weights)


class Forgetting(FusedEngine):
    def load_weights(self, weights):
        super().load_weights((name, tensor) for name, tensor in weights if name != NORM)


def repack(engine):
    engine.layers[1].norms[0].data = engine.layers[1].norms[0].data.flip(0)


def change(engine):
    engine.layers[1].norms[0].data.mul_(2)


@pytest.mark.parametrize(
    ("engine_class", "after", "reason"),
    [
        (Adding, lambda engine: None, "the engine made no plain copy of it"),
        (Forgetting, lambda engine: None, "the engine made no plain copy of it"),
        (FusedEngine, repack, "the engine repacked layers.1.norms.0 after it was loaded"),
        (FusedEngine, change, "the engine changed layers.1.norms.0 after it was loaded"),
    ],
)
def test_what_the_engine_holds_in_another_form_is_refused(checkpoint, engine_class, after, reason):
    layout, storages = load(engine_class(checkpoint.config), tensors_of(checkpoint), after)
    assert layout.untraced == {NORM: reason}
    with pytest.raises(SourceRefused, match=f"{NORM}: {reason}"):
        assemble(checkpoint.config, layout.on(storages), dtype=torch.float32, untraced=layout.untraced)


def test_other_shapes_dtypes_and_absent_tensors_are_refused(checkpoint):
    tensors = tensors_of(checkpoint)
    for changed, reason in (
        ({NORM: tensors[NORM][:5]}, "its shape"),
        ({NORM: tensors[NORM].half()}, "its dtype"),
        ({NORM: None}, "the engine loaded no such tensor"),
    ):
        given = {name: t for name, t in {**tensors, **changed}.items() if t is not None}
        with pytest.raises(SourceRefused, match=f"{NORM}.*{reason}"):
            assemble(checkpoint.config, given, dtype=torch.float32)


def test_experts_that_the_loader_would_merge_are_refused(tmp_path):
    from safetensors.torch import load_file

    mixtral = tiny("mixtral", dtype=torch.float32)
    mixtral.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with pytest.raises(SourceRefused, match=r"experts\.\w+: transformers makes it of several tensors"):
        assemble(mixtral.config, tensors, dtype=torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "qwen3", "gpt_neox"])
def test_buffers_are_computed(family, tmp_path):
    """Rotary frequencies, embedding scales and the like are in no checkpoint."""
    checkpoint = tiny(family, dtype=torch.float32)
    same(assemble(checkpoint.config, tensors_of(checkpoint), dtype=torch.float32), checkpoint)


def test_a_buffer_that_nobody_computes_is_refused(checkpoint, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(SourceRefused, match="inv_freq is a buffer whose value transformers does not compute"):
        assemble(checkpoint.config, tensors_of(checkpoint), dtype=torch.float32)


def test_shared_and_mapped(checkpoint):
    engine = FusedEngine(checkpoint.config)
    layout, storages = load(engine, tensors_of(checkpoint))
    before = {name: t.detach().clone() for name, t in engine.tensors()}
    file, layout = share(engine, layout, storages)
    assert storages == []
    for name, tensor in engine.tensors():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
        assert tensor.untyped_storage().data_ptr() == file.storage.data_ptr()
    mapped = MappedFile(file.path, file.size)
    model = assemble(checkpoint.config, layout.on([mapped.storage]), dtype=torch.float32)
    same(model, checkpoint)
    # The engine's changes are seen here; ours nowhere else.
    with torch.no_grad():
        engine.norm.fill_(3.0)
        assert (model.model.norm.weight == 3.0).all()
        model.model.norm.weight.fill_(5.0)
        assert (engine.norm == 3.0).all()


def test_the_version_is_odd_while_weights_change():
    file = SharedFile([100, 5000])
    mapped = MappedFile(file.path, file.size)
    assert mapped.version == 0
    file.begin_change()
    file.begin_change()
    assert mapped.version is None
    file.end_change()
    file.end_change()
    assert mapped.version == 2


def test_nobody_else_can_write(tmp_path):
    file = SharedFile([100])
    with pytest.raises((OSError, RuntimeError)):
        torch.UntypedStorage.from_file(file.path, True, file.size)
    with pytest.raises(PermissionError), Path(file.path).open("r+b") as again:
        again.truncate(10)
    with pytest.raises(SourceRefused, match="can't be mapped"):
        MappedFile(str(tmp_path / "none"), 10)


def test_memory_that_something_else_holds_is_not_moved(checkpoint):
    engine = FusedEngine(checkpoint.config)
    layout, storages = load(engine, tensors_of(checkpoint))
    alias = engine.layers[0].o.data.t()
    with pytest.raises(SourceRefused, match=r"something else in the engine holds the memory of layers\.0\.o"):
        share(engine, layout, storages)
    assert engine.layers[0].o.data_ptr() == alias.data_ptr()
    expected = dict(checkpoint.named_parameters())["model.layers.0.self_attn.o_proj.weight"]
    assert torch.equal(engine.layers[0].o, expected)


def test_the_layout_goes_through_json(checkpoint):
    import msgspec

    layout, _ = load(FusedEngine(checkpoint.config), tensors_of(checkpoint))
    again = msgspec.json.decode(msgspec.json.encode(layout), type=Layout)
    assert again == layout
