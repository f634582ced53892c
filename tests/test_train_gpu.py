"""What only a GPU has of the native engine: bitsandbytes' optimisers, fp16 with loss scaling."""

import pytest
import torch
from train_fixtures import adapted, some_rows, tiny_spec, trained

from lora_kit.train import native
from lora_kit.train.optimizers import make_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu():
    model = adapted().to("cuda", torch.float16)
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_every_optimiser_lowers_the_loss_in_fp16(optimizer):
    rows = some_rows(8)
    spec = tiny_spec(batch_size=8, steps=30, optimizer=optimizer)
    done = native.train(on_gpu(), rows, spec, 30, 0, say=lambda *_: None).progress
    assert done.losses[-1][1] < done.losses[0][1] - 0.2
    assert done.skipped == 0


def test_8_bit_states_take_a_quarter_of_the_bytes():
    sizes = {}
    for name in ("adamw", "adamw-8bit"):
        weight = torch.nn.Parameter(torch.randn(256, 256, device="cuda"))
        optimizer = make_optimizer([weight], tiny_spec(optimizer=name), weight.device)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        states = [t for t in optimizer.state[weight].values() if torch.is_tensor(t)]
        big = [t for t in states if t.numel() == weight.numel()]
        assert len(big) == 2
        sizes[name] = sum(t.numel() * t.element_size() for t in big)
    assert sizes["adamw"] == 4 * sizes["adamw-8bit"]


def test_a_checkpointed_step_has_the_losses_of_a_plain_one():
    rows, losses = some_rows(8), []
    for checkpointing in (False, True):
        spec = tiny_spec(batch_size=8, steps=6, checkpointing=checkpointing)
        done = native.train(on_gpu(), rows, spec, 6, 0, say=lambda *_: None).progress
        losses.append([loss for _, loss in done.losses])
    torch.testing.assert_close(*losses, atol=2e-3, rtol=2e-3)
