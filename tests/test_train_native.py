import math
from functools import partial

import pytest
import torch
from train_fixtures import adapted, some_rows, tiny_spec, trained

from lora_kit.errors import BadInputError, RunFailedError
from lora_kit.prompts import IGNORE
from lora_kit.train import native
from lora_kit.train.graphs import Steps


def quiet(*_):
    return None


def run(model, rows, spec, steps=None, **options):
    return native.train(model, rows, spec, steps or spec.steps, 0, say=quiet, **options)


def steps_of(model):
    """What `native.train` runs batches with on a CPU."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    once = partial(native.forward_backward, model, torch.float32, scaler)
    return Steps(once, trained(model).values())


def peft_and_ours(rank=4, alpha=8):
    """The same tiny Llama with the same adapter: peft's and this kit's."""
    from lora_fixtures import peft_layers, tiny_llama
    from peft import LoraConfig, get_peft_model

    from lora_kit.lora import lora_layers

    ours = adapted()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(tiny_llama(), config)
    for path, layer in peft_layers(theirs).items():
        mine = lora_layers(ours)[path]
        layer.lora_A["default"].weight.data.copy_(mine.lora_A["default"].data)
        layer.lora_B["default"].weight.data.copy_(mine.lora_B["default"].data)
    return theirs, ours


def test_the_loss_and_gradient_of_a_step_are_those_of_transformers():
    """peft's model, padded rows and transformers' own loss against packed rows and ours."""
    from lora_fixtures import peft_layers

    from lora_kit.lora import lora_layers

    theirs, ours = peft_and_ours()
    rows = some_rows(6)
    longest = max(len(r["input_ids"]) for r in rows)
    ids = torch.zeros(6, longest, dtype=torch.long)
    labels = torch.full((6, longest), IGNORE)
    mask = torch.zeros(6, longest, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), 1
        labels[i, :n] = torch.tensor(row["labels"])
    loss = theirs.train()(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    spec = tiny_spec(batch_size=6)
    progress = native.Progress(at_once=6)
    mine = native.backward(steps_of(ours), rows, spec, progress, 0, quiet)
    torch.testing.assert_close(mine, loss.detach(), atol=1e-6, rtol=1e-6)
    for path, layer in peft_layers(theirs).items():
        for kind in ("lora_A", "lora_B"):
            expected = getattr(layer, kind)["default"].weight.grad
            got = getattr(lora_layers(ours)[path], kind)["default"].grad
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_a_run_gives_the_losses_and_the_adapter_of_trl(tiny_folder, tokenizer):
    """Same start, same rows every step (a batch is all of them), five steps."""
    from lora_fixtures import peft_layers

    from lora_kit.lora import lora_layers
    from lora_kit.train import engines

    theirs, ours = peft_and_ours()
    rows = some_rows(8)
    spec = tiny_spec(batch_size=4, accumulation=2, warmup=0.2, steps=5)
    # trl divides by the labels of all accumulated batches, as this loop does.
    expected = engines.train(theirs, tokenizer, rows, spec, 5)
    done = run(ours, rows, spec)
    for (step, loss), (_, wanted) in zip(done.progress.losses, expected.losses, strict=True):
        assert loss == pytest.approx(wanted, abs=2e-5), step
    for path, layer in peft_layers(theirs).items():
        got = lora_layers(ours)[path].lora_B["default"]
        torch.testing.assert_close(got, layer.lora_B["default"].weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_the_gradient_does_not_depend_on_how_many_rows_go_at_once(at_once):
    rows, spec = some_rows(8), tiny_spec(batch_size=8)
    gradients = []
    for size in (8, at_once):
        model = adapted()
        progress = native.Progress(at_once=size)
        native.backward(steps_of(model), rows, spec, progress, 0, quiet)
        assert progress.tokens == sum(len(r["input_ids"]) for r in rows)
        gradients.append([p.grad for p in trained(model).values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_logits_are_made_only_where_there_is_a_label():
    model, rows = adapted(), some_rows(6)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda m, i, o: seen.append(len(i[0])))
    native.loss_sum(model, native.collate(rows, 0), torch.float32)
    assert seen == [sum(x != IGNORE for r in rows for x in r["labels"][1:])]


def test_many_labels_go_through_the_head_in_pieces_with_the_same_gradient(monkeypatch):
    rows, gradients = some_rows(8), []
    for most in (10_000, 7):
        monkeypatch.setattr(native, "LABELS_AT_ONCE", most)
        model = adapted()
        loss = native.loss_sum(model, native.collate(rows, 0), torch.float32)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in trained(model).values())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_training_lowers_the_loss_and_moves_only_the_adapter():
    model, rows = adapted(initializer_range=0.3), some_rows(4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = run(model, rows, tiny_spec(steps=30))
    losses = [loss for _, loss in done.progress.losses]
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert not model.training


def test_checkpointing_of_layers_changes_nothing():
    rows, spec = some_rows(8), tiny_spec(steps=3)
    plain, checkpointed = adapted(), adapted()
    run(plain, rows, spec)
    run(checkpointed, rows, tiny_spec(steps=3, checkpointing=True))
    for name, parameter in trained(plain).items():
        torch.testing.assert_close(parameter, trained(checkpointed)[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_an_fp32_adapter_and_follows_the_fp32_losses(dtype):
    rows, spec = some_rows(8), tiny_spec(steps=8, warmup=0.0)
    exact = run(adapted(), rows, spec).progress.losses
    model = adapted().to(dtype)
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    done = run(model, rows, spec).progress
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert all(bool(p.isfinite().all()) for p in trained(model).values())
    assert done.skipped == 0
    for (_, loss), (_, wanted) in zip(done.losses, exact, strict=True):
        assert loss == pytest.approx(wanted, rel=0.02)


def test_same_seed_same_bits_with_dropout_on_and_another_seed_differs():
    rows = some_rows(10)
    results = []
    for seed in (3, 3, 4):
        spec = tiny_spec(dropout=0.2, seed=seed)
        model = adapted(spec, seed=seed)
        run(model, rows, spec)
        results.append(trained(model))
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name])
    assert any(not torch.equal(p, results[2][n]) for n, p in results[0].items())


def test_the_callers_random_generator_is_left_alone():
    spec = tiny_spec(dropout=0.2, steps=2)
    model = adapted(spec)
    before = torch.get_rng_state()
    run(model, some_rows(4), spec)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_sees_every_row_once_in_a_new_order():
    epochs = [
        [i for step in range(3 * e, 3 * e + 3) for i in native.row_order(10, 4, step, seed=1)]
        for e in range(2)
    ]
    assert [sorted(e) for e in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert native.row_order(10, 4, 0, seed=1) != native.row_order(10, 4, 0, seed=2)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_is_that_of_transformers(schedule):
    from transformers import get_scheduler

    from lora_kit.train.engines import SCHEDULERS

    spec = tiny_spec(schedule=schedule, warmup=0.25, learning_rate=3e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(
        SCHEDULERS[schedule], optimizer, num_warmup_steps=5, num_training_steps=20
    )
    for step in range(20):
        rate = native.learning_rate(step, 20, spec)
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_gradient_is_clipped():
    spec = tiny_spec(max_grad_norm=1e-6, warmup=0.0, steps=1, learning_rate=1.0)
    seen = []
    original = torch.nn.utils.clip_grad_norm_

    def watch(parameters, most):
        norm = original(parameters, most)
        seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)))
        return norm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
        run(adapted(), some_rows(4), spec)
    assert seen == [pytest.approx(1e-6, rel=1e-3)]


# ------------------------------------------------------------------ what goes wrong


def spoil(model, steps):
    """Make the loss of the given forward passes NaN (counted from 0)."""
    count = iter(range(10_000))

    def hook(module, inputs, output):
        return output * float("nan") if next(count) in steps else output

    model.get_output_embeddings().register_forward_hook(hook)


def test_a_nan_step_is_skipped_and_counted_and_the_run_goes_on():
    model = adapted()
    spoil(model, {2})
    done = run(model, some_rows(4), tiny_spec(steps=6)).progress
    assert done.skipped == 1
    assert [step for step, _ in done.losses] == [1, 2, 4, 5, 6]
    assert all(bool(p.isfinite().all()) for p in trained(model).values())


def test_a_skipped_step_leaves_adapter_and_optimiser_as_they_were():
    model = adapted()
    kept = []
    spoil(model, {1})

    def note(step, loss):
        kept.append({n: p.detach().clone() for n, p in trained(model).items()})

    run(model, some_rows(4), tiny_spec(steps=3, warmup=0.0), on_step=note)
    assert all(torch.equal(kept[0][n], kept[1][n]) for n in kept[0])
    assert any(not torch.equal(kept[1][n], kept[2][n]) for n in kept[0])


def test_nan_that_does_not_stop_ends_the_run_with_reason_and_cure():
    model = adapted()
    spoil(model, set(range(20, 10_000)))
    with pytest.raises(RunFailedError, match=r"loss was NaN.*3 steps in a row.*learning rate"):
        run(model, some_rows(4), tiny_spec(steps=60))
    model = adapted()
    spoil(model, set(range(10_000)))
    with pytest.raises(RunFailedError, match=r"very first steps.*float32"):
        run(model, some_rows(4), tiny_spec(steps=60))


def test_under_fp16_an_overflow_lowers_the_loss_scale():
    model = adapted().half()
    for parameter in trained(model).values():
        parameter.data = parameter.data.float()
    scales = []
    original = torch.amp.GradScaler.update

    def watch(self, *a):
        original(self, *a)
        scales.append(self.get_scale())

    spoil(model, {1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "update", watch)
        done = run(model, some_rows(4), tiny_spec(steps=4))
    assert done.progress.skipped == 1
    assert scales == [2.0**14, 2.0**13, 2.0**13, 2.0**13]


class SmallMemory:
    """A model whose forward pass runs out of memory above `most` tokens."""

    def __init__(self, model, most):
        self.tries = 0

        def hook(module, args, kwargs):
            self.tries += 1
            if kwargs["input_ids"].numel() > most:
                raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

        model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)


def test_out_of_memory_takes_fewer_rows_at_once_and_the_same_steps():
    rows = some_rows(8)
    spec = tiny_spec(batch_size=8, steps=4)
    roomy, tight = adapted(), adapted()
    SmallMemory(tight, 64)
    said = []
    run(roomy, rows, spec)
    done = native.train(tight, rows, spec, 4, 0, say=said.append)
    assert done.progress.at_once < 8
    assert "out of memory" in said[0]
    assert f"{done.progress.at_once} rows at once" in [s for s in said if "out of" in s][-1]
    for name, parameter in trained(roomy).items():
        torch.testing.assert_close(parameter, trained(tight)[name], atol=1e-5, rtol=1e-3)


def test_out_of_memory_with_a_single_row_says_what_to_do():
    model = adapted()
    SmallMemory(model, 0)
    with pytest.raises(RunFailedError, match=r"single row.*checkpointing.*nf4"):
        run(model, some_rows(4), tiny_spec())


def test_a_model_that_caps_its_logits_is_refused():
    model = adapted()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(BadInputError, match="trl"):
        run(model, some_rows(4), tiny_spec())
