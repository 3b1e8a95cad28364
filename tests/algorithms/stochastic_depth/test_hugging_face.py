"""Layers of Hugging Face transformers."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etude.functional as cf
from etude.algorithms.stochastic_depth.blocks import block_type_of
from etude.algorithms.stochastic_depth.blocks.hugging_face import BLOCK_TYPES
from etude.algorithms.stochastic_depth.blocks.tracing import SplitError, trace_branches
from helpers.conversion import (
    Method,
    assert_close,
    calls_of,
    check_rate_zero,
    check_training_folding_and_removal,
    outcome,
)
from helpers.hugging_face import FAMILIES, Hidden, build


def is_known(module: nn.Module) -> bool:
    return block_type_of(type(module)) is not None


def convert(name: str, **settings: Any) -> tuple[Hidden, Any]:
    network, inputs = build(name)
    cf.apply_stochastic_depth(network, **{"drop_rate": 0.5, "drop_distribution": "uniform", **settings})
    return network, inputs


def test_every_layer_is_tested() -> None:
    classes = {type(module) for name in FAMILIES for module in build(name)[0].modules() if is_known(module)}
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in classes} == set(BLOCK_TYPES)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_branches_are_all_that_a_layer_computes(name: str) -> None:
    network, inputs = build(name)
    calls = calls_of(network.eval(), inputs, is_known)
    assert len(calls) == 2
    for call in calls:
        block_type: Any = block_type_of(type(call.block))
        args, kwargs = block_type.without_state(call.block, call.args, call.kwargs)
        out = call.x
        for branch in block_type.branches_of(call.block):
            out = branch.run(call.block, out, 1.0, *args, **kwargs)
        assert torch.allclose(out, call.block(call.x, *args, **kwargs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "encoder" not in name])
def test_the_tracer_finds_the_branches_that_are_written_by_hand(name: str) -> None:
    network, inputs = build(name)
    num_compared = 0
    for call in calls_of(network.eval(), inputs, is_known):
        block_type: Any = block_type_of(type(call.block))
        try:
            traced = trace_branches(call.block, type(call.block), {})
        except SplitError:
            continue
        if not traced:
            continue
        branches = block_type.branches_of(call.block)
        assert len(traced) == len(branches)
        for ours, theirs in zip(branches, traced, strict=True):
            assert torch.equal(ours.drop(call.block, call.x), theirs.drop(call.block, call.x))
            num_compared += 1
    assert num_compared > 0 or "BERT" in name, "only BERT adds in modules of its own"


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("name", FAMILIES)
def test_at_rate_zero_outputs_and_gradients_are_those_of_the_plain_network(name: str, method: Method) -> None:
    check_rate_zero(*build(name), method)


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_trains_folds_and_can_be_restored(name: str, method: Method) -> None:
    check_training_folding_and_removal(*build(name), method)


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_and_positions_reach_the_kept_rows(name: str) -> None:
    """Every row is computed as if its sample were alone, whatever the other rows do."""
    network, inputs = convert(name, stochastic_method="sample")
    first = cf.stochastic_blocks(network)[0]
    plain = cf.remove_stochastic_depth(copy.deepcopy(network)).eval()
    (call, *_) = calls_of(plain, inputs, is_known)
    network(inputs)  # checks the split
    dropped = torch.tensor([True, False, False, True])
    first.drop_plan.decide(torch.stack([dropped] * len(first.drop_plan.rates)).numpy())
    first.drop_plan.open()
    args, kwargs = first.block_type.without_state(first, call.args, call.kwargs)
    out, none = first(call.x, *args, **kwargs), call.x
    for branch in first.block_type.branches_of(first):
        none = branch.drop(first, none)
    expected = torch.where(dropped[:, None, None], none, call.block(call.x, *args, **kwargs))
    assert torch.allclose(out, expected, rtol=1e-6, atol=1e-6)  # Llama normalises in single precision
    assert not torch.allclose(none, expected)


def test_a_mask_with_another_number_of_rows_is_refused_by_name() -> None:
    network, inputs = convert("BERT", stochastic_method="sample")
    block = cf.stochastic_blocks(network)[0]
    network(inputs)
    block.drop_plan.decide(torch.tensor([[True, False, False, True]] * 2).numpy())
    block.drop_plan.open()
    with pytest.raises(ValueError, match=r"argument attention_mask must have one row for each of the 4 samples"):
        block(torch.randn(4, 5, 16, dtype=torch.float64), attention_mask=torch.ones(8, 1, 5, 5, dtype=torch.bool))


def test_dinov2s_own_rates_are_taken_over() -> None:
    network, _ = build("DINOv2")
    cf.apply_stochastic_depth(network)
    plan = cf.stochastic_blocks(network)[0].drop_plan
    assert (plan.rates, plan.scaling) == ([0.2, 0.2], "training")


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_training_fills_no_cache_and_generation_is_as_before(name: str) -> None:
    network, inputs = convert(name, scaling="training")
    plain = cf.remove_stochastic_depth(copy.deepcopy(network)).eval()
    model: Any = network.model
    cache = model(**inputs).past_key_values
    assert cache is None or cache.get_seq_length() == 0
    network.eval()
    ids, more = inputs["input_ids"], torch.randint(2, 11, (4, 1))
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    outputs = []
    for one in (model, plain.model):
        cache = one(input_ids=ids, use_cache=True).past_key_values
        outputs.append(one(input_ids=more, **{argument: cache}).last_hidden_state)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("method", ["block", "sample"])
def test_gradient_checkpointing_of_transformers_recomputes_with_the_same_plan(method: Method) -> None:
    network, inputs = convert("Llama", stochastic_method=method)
    model: Any = network.model
    model.config.use_cache = False
    checkpointed = copy.deepcopy(network)
    enable = getattr(checkpointed.model, "activation_checkpointing_enable", None)
    (enable or checkpointed.model.gradient_checkpointing_enable)({"use_reentrant": False})
    for _ in range(4):
        assert_close(outcome(checkpointed, inputs), outcome(network, inputs))


def test_hidden_states_of_all_layers_are_returned() -> None:
    network, inputs = convert("ViT")
    model: Any = network.model
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3


def scaled(block: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
    """What another version of ViTLayer might compute."""
    attended, _ = block.attention(block.layernorm_before(hidden_states), attention_mask, **kwargs)
    hidden_states = hidden_states + 0.5 * block.dropout(attended)
    return hidden_states + block.dropout(block.mlp(block.layernorm_after(hidden_states)))


def in_a_tuple(block: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
    """What older versions return."""
    return (scaled(block, hidden_states, attention_mask, **kwargs),)


@pytest.mark.parametrize(
    ("version", "message"),
    [(scaled, "must give the block's own output, the largest difference is"), (in_a_tuple, "must return a tensor")],
)
def test_a_version_whose_layers_compute_something_else_is_refused(
    version: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.vit.modeling_vit import ViTLayer

    network, inputs = build("ViT")
    monkeypatch.setattr(ViTLayer, "forward", version)
    cf.apply_stochastic_depth(network, drop_rate=0.1)
    with pytest.raises(ValueError, match=rf"ViTLayer\) {message}"):
        network(inputs)


def test_bert_with_cross_attention_is_refused_with_the_reason() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        is_decoder=True,
        add_cross_attention=True,
    )
    with pytest.raises(ValueError, match="may be residual: BertLayer: its cross-attention"):
        cf.apply_stochastic_depth(BertModel(config))


def test_layers_that_the_model_skips_itself_are_named(caplog: pytest.LogCaptureFixture) -> None:
    network, _ = build("Wav2Vec2")
    model: Any = network.model
    model.config.layerdrop = 0.1
    cf.apply_stochastic_depth(network, drop_rate=0.1)
    assert "skips layers itself (config.layerdrop=0.1), in addition to the drop rates" in caplog.text
