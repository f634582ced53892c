"""Batches of few shapes, and steps replayed as CUDA graphs (where there is a GPU)."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from train_fixtures import adapted, some_rows, tiny_spec, trained

from lora_kit.prompts import IGNORE
from lora_kit.train import native
from lora_kit.train.graphs import (
    LABEL_STEP,
    LENGTH_STEP,
    GraphedSteps,
    Steps,
    graphs_pay,
    widen,
)

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
OFF = torch.amp.GradScaler("cpu", enabled=False)


@pytest.mark.parametrize("pack", [True, False])
def test_a_widened_batch_has_the_loss_and_gradient_it_had(pack):
    rows = some_rows(7)
    batch = native.collate(rows, 0, pack)
    found = []
    for one in (batch, widen(batch, pad_id=0)):
        model = adapted()
        loss = native.forward_backward(model, torch.float32, OFF, one, torch.tensor(13.0))
        found.append((loss, [p.grad for p in trained(model).values()]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    for narrow, wide in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(narrow, wide, atol=1e-7, rtol=1e-4)


def test_widened_shapes_are_few_and_hold_the_same_rows():
    shapes = set()
    for seed in range(20):
        batch = native.collate(some_rows(5 + seed % 3, seed=seed), 0)
        wide = widen(batch, pad_id=0)
        shapes.add((wide.input_ids.shape[1] % LENGTH_STEP, len(wide.picked) % LABEL_STEP))
        assert wide.tokens == batch.tokens
        labelled = wide.targets != IGNORE
        assert labelled.sum() == len(batch.targets)
        before = batch.input_ids.flatten()[batch.picked]
        assert torch.equal(wide.input_ids.flatten()[wide.picked[labelled]], before)
        assert torch.equal(wide.segments[:, : batch.segments.shape[1]], batch.segments)
        assert (wide.segments[:, batch.segments.shape[1] :] == -1).all()
    assert shapes == {(0, 0)}


def test_graphs_are_for_gpus_and_not_for_dropout_that_is_computed_again():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    spec = tiny_spec()
    assert graphs_pay(spec, gpu)
    assert not graphs_pay(spec, cpu)
    assert not graphs_pay(replace(spec, compile=False), gpu)
    assert not graphs_pay(replace(spec, checkpointing=True, dropout=0.1), gpu)
    assert graphs_pay(replace(spec, checkpointing=True, compile="graph"), gpu)


def test_after_giving_up_no_gradient_is_left():
    model = adapted()
    steps = Steps(partial(native.forward_backward, model, torch.float32, OFF), model.parameters())
    steps.run(native.collate(some_rows(2), 0), 5)
    assert not steps.give_up()
    assert all(p.grad is None for p in model.parameters())


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_graphed_run_has_the_losses_of_an_eager_one(dtype):
    rows, losses = some_rows(24), {}
    for compile in ("graph", False):
        model = adapted().to("cuda", dtype)
        for parameter in trained(model).values():
            parameter.data = parameter.data.float()
        spec = tiny_spec(batch_size=6, steps=24, compile=compile)
        done = native.train(model, rows, spec, 24, 0, say=lambda *_: None)
        losses[compile] = [loss for _, loss in done.progress.losses]
    tight = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(losses["graph"], losses[False], atol=tight, rtol=tight)


@GPU
def test_what_cannot_be_recorded_runs_without_a_graph():
    model = adapted().to("cuda")
    said = []

    def waits(batch, labels):
        loss = native.forward_backward(model, torch.float32, OFF, batch, labels)
        float(loss)
        return loss

    steps = GraphedSteps(waits, trained(model).values(), 0, said.append)
    batch = native.collate(some_rows(3), 0)
    first = float(steps.run(batch, 5))
    assert float(steps.run(batch, 5)) == pytest.approx(first, rel=1e-5)
    assert steps.broken
    assert "the run goes on without" in said[0]
