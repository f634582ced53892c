"""The 4-bit layer equals the dense layer on the dequantised weight, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lora_kit.errors import BadInputError
from lora_kit.linear4bit import NF4Linear


def linear(in_features=128, out_features=96, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4"])
def test_forward_and_backward_equal_the_dense_layer(bias, double, format):
    dense = linear(bias=bias)
    layer = NF4Linear.from_linear(dense, double_quant=double, format=format)
    x = torch.randn(3, 5, 128, requires_grad=True)
    y_grad = torch.randn(3, 5, 96)
    y = layer(x)
    y.backward(y_grad)
    other = x.detach().clone().requires_grad_()
    want = functional.linear(other, layer.dequantized_weight(), dense.bias)
    want.backward(y_grad)
    assert torch.equal(y, want)
    assert torch.equal(x.grad, other.grad)
    assert not torch.equal(layer.dequantized_weight(), dense.weight)


def test_weight_is_that_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    dense = linear()
    codes, state = bnb.quantize_4bit(
        dense.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    layer = NF4Linear.from_linear(dense)
    assert torch.equal(layer.dequantized_weight(), bnb.dequantize_4bit(codes, state))


def test_only_the_input_gets_a_gradient_and_nothing_else_trains():
    layer = NF4Linear.from_linear(linear())
    assert not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(2, 128)
    assert not layer(x).requires_grad
    assert layer(x.requires_grad_()).requires_grad


def test_bias_gets_its_gradient_when_asked():
    layer = NF4Linear.from_linear(linear())
    layer.bias.requires_grad_()
    layer(torch.randn(3, 5, 128)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((96,), 15.0))


def test_gradient_is_numerically_right():
    layer = NF4Linear.from_linear(linear(16, 8))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    layer.bias.data = layer.bias.data.double()
    assert torch.autograd.gradcheck(layer, (x,))


def test_nothing_dense_is_kept_between_the_passes():
    layer = NF4Linear.from_linear(linear(), compute_dtype=torch.float32)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        layer(torch.randn(2, 128, requires_grad=True))
    assert held == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("double", [True, False])
def test_state_dict_round_trip(bias, double, tmp_path):
    from safetensors.torch import load_file, save_file

    layer = NF4Linear.from_linear(linear(bias=bias), double_quant=double)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    empty = NF4Linear(128, 96, bias=bias, double_quant=double)
    empty.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(4, 128)
    assert torch.equal(empty(x), layer(x))


def test_odd_sizes_and_other_blocks():
    dense = linear(33, 7)
    for block_size in (32, 64, 128):
        layer = NF4Linear.from_linear(dense, block_size=block_size)
        x = torch.randn(2, 33)
        want = functional.linear(x, layer.dequantized_weight(), dense.bias)
        assert torch.equal(layer(x), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_module_leaves_the_scales_alone(dtype):
    layer = NF4Linear.from_linear(linear())
    plain = NF4Linear.from_linear(linear(), double_quant=False)
    cast, cast_plain = copy.deepcopy(layer).to(dtype), copy.deepcopy(plain).to(dtype)
    assert cast.absmax_scales.dtype == cast_plain.absmax.dtype == torch.float32
    assert torch.equal(cast.dequantized_weight(), layer.dequantized_weight())
    assert torch.equal(cast_plain.dequantized_weight(), plain.dequantized_weight())
    assert cast(torch.randn(2, 128, dtype=dtype)).dtype == dtype


def test_compute_dtype_and_autocast():
    x = torch.randn(4, 128, requires_grad=True)
    layer = NF4Linear.from_linear(linear(), compute_dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.float32
    weight = layer.dequantized_weight(torch.bfloat16)
    want = functional.linear(x.bfloat16(), weight, layer.bias.bfloat16()).float()
    assert torch.equal(y, want)
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    plain = NF4Linear.from_linear(linear())
    with torch.autocast("cpu", torch.bfloat16):
        out = plain(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), want)
    out.float().sum().backward()


def test_eval_and_train_give_the_same_numbers_and_move_nothing():
    layer = NF4Linear.from_linear(linear())
    before = layer.codes.clone()
    x = torch.randn(2, 128)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    assert torch.equal(layer.codes, before)


def test_works_under_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    layer = NF4Linear.from_linear(linear())
    x = torch.randn(2, 128, requires_grad=True)
    layer(x).square().sum().backward()
    want, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, want)


def test_bytes_are_an_eighth_of_the_dense_layer():
    dense = linear(512, 512, bias=False)
    layer = NF4Linear.from_linear(dense)
    held = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert held == layer.quantized_weight.nbytes
    assert held / (4 * dense.weight.numel()) == pytest.approx(4.127 / 32, rel=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_weight_on_a_gpu():
    for double in (False, True):
        on_cpu = NF4Linear.from_linear(linear(), double_quant=double)
        on_gpu = NF4Linear.from_linear(linear().cuda(), double_quant=double)
        assert torch.equal(on_cpu.codes, on_gpu.codes.cpu())
        ours, theirs = on_cpu.cuda().dequantized_weight(), on_gpu.dequantized_weight()
        # The mean that double quantisation takes off is summed in another order there.
        assert torch.allclose(ours, theirs, rtol=1e-5 if double else 0, atol=0)


def test_bad_input_is_named():
    with pytest.raises(BadInputError, match="Conv1d"):
        NF4Linear.from_linear(nn.Conv1d(4, 4, 1))
    with pytest.raises(BadInputError, match="int8"):
        NF4Linear.from_linear(linear(), format="int8")
    with pytest.raises(BadInputError, match="128 features, not 64"):
        NF4Linear.from_linear(linear())(torch.randn(2, 64))
    broken = linear()
    broken.weight.data[3, 3] = torch.nan
    with pytest.raises(BadInputError, match="NaN"):
        NF4Linear.from_linear(broken)
