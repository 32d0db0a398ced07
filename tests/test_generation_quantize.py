"""Quantized weights: layouts, error bounds, and the modules in a model."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.errors import ArtifactError, GroundupError
from groundup.generation.gptq import DAMPING, gptq
from groundup.generation.quantize import Quantization, Quantized, QuantizedLinear, quantization_of, quantize
from groundup.generation.rounding import Bits, dequantize, pack, round_to_nearest
from groundup.model import ModelConfig, Transformer, count_parameters


def _model(**changes: Any) -> Transformer:
    sizes = {"vocab_size": 70, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "head_dim": 16}
    model = Transformer(ModelConfig(**{**sizes, "context_length": 32, **changes}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # as large as trained ones: fresh output layers are zeros
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.08, generator=generator)
    return model.eval()


@given(st.sampled_from([8, 4]), st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_packing_is_undone_by_unpacking(bits: Bits, seed: int, runs: int) -> None:
    low, high = (-128, 128) if bits == 8 else (-8, 8)
    values = torch.from_numpy(np.random.default_rng(seed).integers(low, high, (3, runs * 32), dtype=np.int8))
    packed = pack(values, bits)
    assert packed.nbytes == values.numel() * bits // 8
    scales = torch.ones(3, runs, dtype=torch.float16)
    assert torch.equal(dequantize(packed, scales, bits), values.float())


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.sampled_from([32, 64]))
@settings(max_examples=30, deadline=None)
def test_error_bounds(seed: int, size: float, group_size: int) -> None:
    weight = torch.from_numpy(np.random.default_rng(seed).normal(0, size, (5, 128)).astype(np.float32))
    groups = weight.reshape(5, -1, group_size)
    values, scales = round_to_nearest(weight, 8, group_size)
    error = (dequantize(pack(values, 8), scales, 8) - weight).reshape(groups.shape).abs()
    # Half a step, and what the largest loses to the rounding of its scale.
    lost = groups.abs().amax(-1, keepdim=True) * 2**-10 + 127 * 2**-24
    assert (error <= scales.float()[..., None] * 0.5 + lost).all()
    values, scales = round_to_nearest(weight, 4, group_size)
    ours = dequantize(pack(values, 4), scales, 4) - weight
    if group_size == 32:
        kind = gguf.GGMLQuantizationType.Q4_0
        theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)) - weight
        assert ours.square().sum() < theirs.square().sum()


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_layouts_are_those_of_gguf(bits: Bits, kind: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    values, scales = round_to_nearest(weight, bits, 32)
    packed = pack(values, bits)
    parts = (scales.numpy().view(np.uint8).reshape(6, 3, 2), packed.numpy().view(np.uint8).reshape(6, 3, -1))
    blocks = np.concatenate(parts, axis=-1).reshape(6, -1)
    read = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(read, dequantize(packed, scales, bits).numpy())


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zeros(bits: Bits) -> None:
    values, scales = round_to_nearest(torch.zeros(2, 32), bits, 32)
    assert not dequantize(pack(values, bits), scales, bits).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_without_a_scale_is_refused(value: float, bits: Bits) -> None:
    weight = torch.zeros(2, 32)
    weight[1, 3] = value
    with pytest.raises(ArtifactError, match="not finite, or too large for"):
        round_to_nearest(weight, bits, 32)


SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, biases": {"tied_embeddings": False, "bias": True},
    "experts": {"n_experts": 4, "experts_per_token": 2},
    "GPT-2": {"position": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True},
    "windows, post-norm": {"attention": ("window", "full"), "window": 8, "norm_placement": "post"},
    "no parameters but matrices": {"norm_weight": False, "qk_norm": False},
}


def _ids(seed: int, rows: int = 12) -> torch.Tensor:
    return torch.randint(0, 70, (rows, 32), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_computes_what_its_dequantized_weights_do(shape: str, bits: Bits) -> None:
    changes = SHAPES[shape]
    quantized, plain = quantize(_model(**changes), Quantization(bits)), _model(**changes)
    for name, module in quantized.named_modules():
        if isinstance(module, Quantized):
            plain.get_parameter(f"{name}.weight").data = module.weight
            is_output = name == ("embed_tokens" if quantized.lm_head is None else "lm_head")
            assert module.bits == (8 if is_output else bits)
    ids = _ids(1)
    torch.testing.assert_close(quantized(ids), plain(ids))
    kept = {name for name, _ in quantized.named_parameters() if name.endswith(".weight")}
    assert all("norm" in name or name.endswith(("router.weight", "embed_positions.weight")) for name in kept)
    assert quantized.n_parameters == count_parameters(quantized.config)
    assert quantization_of(quantized) == Quantization(bits)
    # The scales keep their dtype and their numbers.
    torch.testing.assert_close(quantized.bfloat16().float()(ids), plain(ids), atol=0.05, rtol=0.05)
    assert all(m.scales.dtype == torch.float16 for m in quantized.modules() if isinstance(m, Quantized))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_gptq_is_nearer_to_the_model_than_rounding(shape: str) -> None:
    changes, ids = SHAPES[shape], _ids(1)
    expected = _model(**changes)(ids)
    errors = {
        (bits, method): float(
            (quantize(_model(**changes), Quantization(bits), method=method, calibration=_ids(3, 32))(ids) - expected)
            .norm() / expected.norm()
        )
        for bits in (8, 4)
        for method in ("rtn", "gptq")
    }  # fmt: skip
    assert errors[4, "gptq"] < 0.95 * errors[4, "rtn"]
    assert errors[8, "rtn"] < 0.4 * errors[4, "rtn"]
    assert errors[8, "gptq"] < errors[8, "rtn"] or shape == "experts"  # there a token may take another expert


def test_int8_activations_cost_little() -> None:
    expected, ids = _model(bias=True)(_ids(1)), _ids(1)
    model = quantize(_model(bias=True), Quantization(8, activations="int8"))
    plain = quantize(_model(bias=True), Quantization(8))
    assert (plain(ids) - expected).norm() < (model(ids) - expected).norm() < 1.5 * (plain(ids) - expected).norm()
    assert model.bfloat16()(ids).isfinite().all()
    linear = model.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(linear, QuantizedLinear)
    assert linear.bias is not None
    assert torch.equal(linear(torch.zeros(2, 64)), linear.bias.expand(2, -1))
    assert linear(torch.zeros(0, 64)).shape == (0, 96)
    assert linear(torch.full((1, 64), torch.nan)).isnan().all()  # nothing wrong is hidden


def test_gptq_follows_the_papers_recursion() -> None:
    """Against the plain form: after each input, H⁻¹ is taken anew for those that are left (the paper's equation 3)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 96, generator=generator)
    inputs = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    gram = inputs.T @ inputs
    values, scales = gptq(weight, gram, 4, 32)
    hessian = gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(96)
    rest, wide = weight.double(), scales.double().repeat_interleave(32, dim=1)
    n_equal = 0
    for i in range(96):
        inverse = torch.linalg.inv(hessian[i:, i:])
        rounded = (rest[:, i] / wide[:, i]).round().clamp(-8, 7)
        n_equal += int((rounded == values[:, i]).sum())
        rest[:, i:] -= ((rest[:, i] - values[:, i] * wide[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    assert n_equal > 0.99 * values.numel()  # float32 falls to the other side of a half now and then

    def error(rounded: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (inputs @ (dequantize(pack(rounded[0], 4), rounded[1], 4) - weight).T).square().sum()

    assert error((values, scales)) < 0.6 * error(round_to_nearest(weight, 4, 32))
    assert all(map(torch.equal, gptq(weight, torch.zeros(96, 96), 4, 32), round_to_nearest(weight, 4, 32)))


@pytest.mark.parametrize("group_size", [32, 64, 96, 160, 320])
def test_gptq_of_any_group(group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64 * group_size // 32 if group_size < 160 else 320, generator=generator)
    inputs = torch.randn(600, weight.shape[1], generator=generator).cumsum(dim=1)
    for bits in (8, 4):
        packed = [
            (pack(values, bits), scales)
            for values, scales in (
                gptq(weight, inputs.T @ inputs, bits, group_size),
                round_to_nearest(weight, bits, group_size),
            )
        ]
        ours, plain = ((inputs @ (dequantize(*one, bits) - weight).T).square().sum() for one in packed)
        assert ours < 0.5 * plain


def test_rows_that_groups_do_not_divide_have_8_bits() -> None:
    model = quantize(_model(d_ff=80), Quantization(4))
    kinds = {name: (m.bits, m.group_size) for name, m in model.named_modules() if isinstance(m, Quantized)}
    assert kinds["layers.0.mlp.down_proj"] == (8, 80)
    assert kinds["layers.0.mlp.up_proj"] == (4, 32)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(GroundupError, match="bits are 8 or 4"):
        Quantization(5)  # type: ignore[arg-type]
    with pytest.raises(GroundupError, match="multiple of 32"):
        Quantization(4, 16)
    with pytest.raises(GroundupError, match="need bits = 8"):
        Quantization(4, activations="int8")
    with pytest.raises(GroundupError, match="quantized already"):
        quantize(quantize(_model()))
    with pytest.raises(GroundupError, match="text to calibrate"):
        quantize(_model(), method="gptq")
    with pytest.raises(GroundupError, match="cannot be trained"):
        quantize(_model()).train()
    model = _model()
    model.get_parameter("layers.1.mlp.up_proj.weight").data[3, 4] = torch.nan
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj: has a value that is not finite"):
        quantize(model)
