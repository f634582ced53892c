"""Rows and a tiny model that the training tests share."""

import torch
from lora_fixtures import tiny_llama

from lora_kit.lora import LoraSpec, add_lora, lora_layers
from lora_kit.train import TrainSpec

VOCAB = 64
torch.set_num_threads(1)  # sums are split by threads: one, so that processes agree bit for bit


def some_rows(count=12, longest=30, seed=0, vocab=VOCAB):
    """Encoded rows of 3 to `longest` tokens; the second half of each carries labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, longest, (1,), generator=generator))
        ids = torch.randint(1, vocab, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return rows


def tiny_spec(**changes):
    made = dict(rank=4, alpha=8, batch_size=4, steps=6, learning_rate=1e-2, dtype="float32")
    return TrainSpec(**made | changes)


def adapted(spec=None, seed=0, live=True, **options):
    """A tiny Llama with an adapter; `live`: B is not zero, so every gradient is."""
    spec = spec or tiny_spec()
    model = tiny_llama(**options)
    add_lora(model, LoraSpec(spec.rank, spec.alpha, "all", spec.dropout), seed=seed)
    if live:
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            with torch.no_grad():
                layer.lora_B["default"].normal_(std=0.1, generator=generator)
    return model


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}
