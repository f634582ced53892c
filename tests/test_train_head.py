"""An adapter on the output head: counted, trained over tied embeddings, saved, read back equal."""

import pytest
import torch
from safetensors.torch import load_file

from lora_kit.architectures import LINEAR, architecture, check_targets
from lora_kit.errors import BadInputError, UnknownNameError
from lora_kit.lora import disable_lora, load_lora, lora_layers, read_adapter
from lora_kit.memory import plan_memory
from lora_kit.models import load_model
from lora_kit.skills import draw_skill
from lora_kit.studies.checks import oswal2025
from lora_kit.studies.papers import read_table, wide
from lora_kit.train import TrainSpec, finetune, recipe
from lora_kit.train.from_data import finetune_from

SPEC = TrainSpec(
    rank=4,
    alpha=8,
    targets="all,lm_head",
    steps=3,
    batch_size=4,
    learning_rate=1e-2,
    max_length=64,
)
ROWS = draw_skill("addition", 2, 10, seed=0)


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory, tokenizer):
    """A tiny Llama whose output head is its embedding, as in SmolLM2 and Llama 3.2."""
    from lora_fixtures import tiny_llama

    folder = tmp_path_factory.mktemp("tied") / "tiny-tied-llama"
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    options = dict(vocab_size=300, eos_token_id=eos, pad_token_id=pad, bos_token_id=None)
    model = tiny_llama(tie_word_embeddings=True, initializer_range=0.3, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tied_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("head") / "adapter"
    return finetune(str(tied_folder), ROWS, SPEC, folder, engine="native")


def test_the_head_trains_and_its_tied_weights_stay(tied_folder, trained):
    base = load_model(str(tied_folder)).model
    assert base.config.tie_word_embeddings
    assert base.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    tensors = load_file(trained.adapter / "adapter_model.safetensors")
    b = tensors["base_model.model.lm_head.lora_B.weight"]
    assert b.abs().max() > 0  # B starts at 0: it moved
    assert not any("base_layer" in name or "embed" in name for name in tensors)
    h, v = base.config.hidden_size, base.config.vocab_size
    assert trained.trainable == sum(t.numel() for t in tensors.values())
    without = {k: t for k, t in tensors.items() if "lm_head" not in k}
    assert trained.trainable - sum(t.numel() for t in without.values()) == 4 * (h + v)


def test_the_head_reads_back_equal_and_its_part_counts(tied_folder, trained):
    ids = torch.randint(0, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    loaded = load_model(str(tied_folder)).model
    before = loaded(input_ids=ids).logits
    embedding = loaded.model.embed_tokens.weight.detach().clone()
    load_lora(loaded, trained.adapter)
    after = loaded(input_ids=ids).logits
    assert torch.equal(loaded.model.embed_tokens.weight, embedding)
    with disable_lora(loaded):
        assert torch.equal(loaded(input_ids=ids).logits, before)
    # By hand: the head's detour alone, over the hidden state that the other adapters give.
    parts = read_adapter(trained.adapter).tensors["lm_head"]
    hidden = loaded.model(input_ids=ids).last_hidden_state
    by_hand = hidden @ embedding.T + 8 / 4 * hidden @ parts["lora_A"].T @ parts["lora_B"].T
    assert torch.allclose(after, by_hand, atol=1e-5)
    lora_layers(loaded)["lm_head"].enabled = False
    assert not torch.allclose(loaded(input_ids=ids).logits, after, atol=1e-4)


def test_peft_reads_the_heads_adapter(tied_folder, trained):
    from peft import PeftModel

    ids = torch.arange(6)[None]
    ours = load_model(str(tied_folder)).model
    load_lora(ours, trained.adapter)
    theirs = PeftModel.from_pretrained(load_model(str(tied_folder)).model, trained.adapter).eval()
    assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)


def test_other_engines_refuse_the_head_before_they_load(tied_folder, tmp_path):
    with pytest.raises(BadInputError, match="engine trl trains no adapter on lm_head"):
        finetune(str(tied_folder), ROWS, SPEC, tmp_path / "a", engine="trl")
    assert not (tmp_path / "a").exists()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{i}+1=", "completion": "2"}}\n' for i in range(4)))
    with pytest.raises(BadInputError, match="take engine='native'"):
        finetune_from(str(tied_folder), str(data), SPEC, "trl", held_out=1, report_only=True)


def test_targets_know_the_head():
    assert check_targets("all,lm_head") == (*LINEAR, "lm_head")
    assert "lm_head" not in check_targets("all")
    with pytest.raises(UnknownNameError, match="lm_head"):
        check_targets("lm_heads")
    shape = architecture("smollm2-135m")
    assert shape.lora_parameters(16, "lm_head") == 16 * (576 + 49152)
    plain, head = (
        dict(plan_memory(shape, rank=16, targets=t).rows)["adapters"]
        for t in ("all", "all,lm_head")
    )
    assert head - plain == 4 * 16 * (576 + 49152)


def test_the_papers_settings_give_every_row_of_its_table():
    """Table 1 in millions; 360M is printed cut (9.4) where 9.485 would round to 9.5."""
    spec = recipe("oswal")
    assert (spec.rank, spec.alpha, spec.dropout, spec.learning_rate) == (16, 16, 0.1, 1e-4)
    assert (spec.batch_size * spec.accumulation, spec.schedule, spec.warmup) == (64, "cosine", 0.05)
    printed = wide(read_table("oswal2025", "table_01"))["Trainable params"]
    assert set(printed.index) == set(oswal2025.SHAPES)
    for row, name in oswal2025.SHAPES.items():
        millions = architecture(name).lora_parameters(spec.rank, spec.targets) / 1e6
        without = architecture(name).lora_parameters(spec.rank) / 1e6
        digits = 0 if printed[row] == int(printed[row]) else 1
        cut = int(millions * 10**digits) / 10**digits
        assert printed[row] in (round(millions, digits), cut), row
        assert abs(without - printed[row]) > 0.5, row  # without the head no row fits


def test_a_merged_head_is_no_longer_tied(tied_folder, trained, tmp_path):
    from lora_kit.train.export import export_merged

    export = export_merged(str(tied_folder), trained, tmp_path / "merged")
    ids = torch.arange(6)[None]
    ours = load_model(str(tied_folder)).model
    load_lora(ours, trained.adapter)
    merged = load_model(str(export.folder)).model
    assert not merged.config.tie_word_embeddings
    wanted = ours(input_ids=ids).logits
    assert (merged(input_ids=ids).logits - wanted).norm() < 0.01 * wanted.norm()  # fp16 weights
