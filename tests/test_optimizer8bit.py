"""8-bit Adam against torch's AdamW and bitsandbytes."""

from __future__ import annotations

import io

import pytest
import torch

from lora_kit.errors import BadInputError
from lora_kit.optimizer8bit import Adam8bit, decode_state, encode_state


def regression(seed=0):
    """A fixed least-squares problem: (parameter, loss of a step)."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(64, 128, generator=g) * 0.1)
    target = torch.randn(64, 128, generator=g)

    def loss(step):
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(step)) * 0.125
        return (x @ (weight - target)).square().mean()

    return weight, loss


def train(optimizer, loss, steps, start=0):
    values = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        value = loss(step)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_nearest_and_error_is_small(signed):
    g = torch.Generator().manual_seed(0)
    state = torch.randn(10_000, generator=g) * torch.logspace(-6, 0, 10_000)
    state = state if signed else state.square()
    codes, absmax = encode_state(state, signed)
    assert codes.dtype == torch.uint8
    assert absmax.numel() == 40
    back = decode_state(codes, absmax, signed)
    scale = absmax.repeat_interleave(256)[:10_000]
    assert ((back - state).abs() <= 0.02 * scale).all()
    large = state.abs() > 0.1 * scale
    assert ((back - state).abs() / state.abs())[large].max() < 0.12


def test_unsigned_tree_is_finer_than_the_signed_one():
    state = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    gaps = [(decode_state(*encode_state(state, s), s) - state).abs().mean() for s in (True, False)]
    assert gaps[1] < 0.6 * gaps[0]


def test_zero_state_and_odd_sizes():
    for size in (1, 255, 257):
        codes, absmax = encode_state(torch.zeros(size))
        assert torch.equal(decode_state(codes, absmax), torch.zeros(size))


def test_small_parameters_follow_adamw_exactly():
    weight, loss = regression()
    other, other_loss = regression()
    settings = {"lr": 0.01, "weight_decay": 0.1}
    ours = Adam8bit([weight], min_8bit_size=10**6, **settings)
    train(ours, loss, 20)
    train(torch.optim.AdamW([other], **settings), other_loss, 20)
    assert torch.allclose(weight, other, rtol=1e-5, atol=1e-7)


def test_first_step_equals_adamw_and_later_ones_stay_near():
    weight, loss = regression()
    other, other_loss = regression()
    start = weight.detach().clone()
    ours, theirs = Adam8bit([weight], lr=0.01), torch.optim.AdamW([other], 0.01, weight_decay=0)
    train(ours, loss, 1)
    train(theirs, other_loss, 1)
    assert torch.allclose(weight, other, rtol=1e-5, atol=1e-6)  # states start from exact zeros
    a = train(ours, loss, 150, 1)
    b = train(theirs, other_loss, 150, 1)
    assert a[-1] < 0.5 * a[0]
    assert a[-1] == pytest.approx(b[-1], rel=0.1)
    apart = (weight - other).norm() / (other - start).norm()
    assert 0 < apart < 0.05


def test_state_takes_a_quarter_and_a_bit():
    weight, loss = regression()
    ours = Adam8bit([weight])
    train(ours, loss, 1)
    n = weight.numel()
    assert ours.state_bytes() == 2 * (n + 4 * n // 256)


def test_near_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    weight, loss = regression()
    other, other_loss = regression()
    train(Adam8bit([weight], lr=0.01), loss, 1)
    train(bnb.optim.AdamW8bit([other], lr=0.01, weight_decay=0), other_loss, 1)
    # From zero states both take the exact step; the codes they keep differ: bitsandbytes rounds
    # to 65,536 values before it looks up a code on a CPU, and loses what is below 1/65,536.
    assert torch.allclose(weight, other, rtol=1e-5, atol=1e-6)


def test_state_survives_saving(tmp_path):
    weight, loss = regression()
    ours = Adam8bit([weight], lr=0.01)
    train(ours, loss, 5)
    file = io.BytesIO()
    torch.save({"weight": weight.detach().clone(), "optimizer": ours.state_dict()}, file)
    train(ours, loss, 5, 5)
    other, other_loss = regression()
    again = Adam8bit([other], lr=0.01)
    file.seek(0)
    saved = torch.load(file)
    other.data.copy_(saved["weight"])
    again.load_state_dict(saved["optimizer"])
    assert again.state[other]["m"].dtype == torch.uint8
    train(again, other_loss, 5, 5)
    assert torch.equal(weight, other)


def test_closure_is_called_and_its_loss_returned():
    weight, loss = regression()
    ours = Adam8bit([weight])

    def closure():
        value = loss(0)
        value.backward()
        return value

    assert ours.step(closure).item() == pytest.approx(loss(0).item(), rel=0.1)
    assert weight.grad is not None


@pytest.mark.parametrize(
    "change", [{"lr": -1}, {"eps": 0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}]
)
def test_bad_settings_are_named(change):
    with pytest.raises(BadInputError, match=next(iter(change))):
        Adam8bit([torch.nn.Parameter(torch.zeros(2))], **change)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradient_that_is_not_finite_is_refused(bad):
    weight, _ = regression()
    weight.grad = torch.full_like(weight, bad)
    with pytest.raises(BadInputError, match="not finite"):
        Adam8bit([weight]).step()
