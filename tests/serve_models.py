"""Tiny bases and adapters that the serving tests share."""

from contextlib import contextmanager

import torch
from lora_fixtures import PLACEMENTS, tiny_llama

from lora_kit.lora import LoraSpec, add_lora, load_lora, lora_layers, save_lora

KINDS = {"all4": (4, "all"), "one": (1, "all"), "attention8": (8, "attention"), "mlp2": (2, "mlp")}


def llama(seed=0, **options):
    """Wide enough for blocks of 64, which bitsandbytes' kernel wants."""
    return tiny_llama(seed, **{"hidden_size": 64, "intermediate_size": 128} | options)


def talking(seed=0):
    """One with the test tokenizer's vocabulary; its greedy answers differ from prompt to prompt."""
    return llama(seed, vocab_size=300, initializer_range=0.3)


def make_adapter(folder, rank, targets, seed, base=0, model=llama, noise=0.3, **options):
    targets = PLACEMENTS.get(targets, targets) if isinstance(targets, str) else targets
    made = add_lora(model(base), LoraSpec(rank, 8, targets, **options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(made).values():
        with torch.no_grad():
            drawn = torch.randn(layer.lora_B["default"].shape, generator=generator)
            layer.lora_B["default"].add_(drawn * noise)
    return save_lora(made, folder)


def adapters_of_kinds(root):
    """A folder of adapters for `talking`, one of each of KINDS."""
    for i, (name, (rank, targets)) in enumerate(KINDS.items()):
        make_adapter(root / name, rank, targets, i, model=talking)
    return root


def answers_alone(tokenizer, folder, prompts, tokens, model=talking):
    """The greedy tokens after each prompt, by transformers' generate on a model that carries this
    adapter (None: the base) and nothing else; ends included are left out, as the engine does."""
    made = model()
    if folder is not None:
        load_lora(made, folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            out = made.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[0, ids.shape[1] :].tolist()
        if tokenizer.eos_token_id in out:
            out = out[: out.index(tokenizer.eos_token_id)]
        found.append(out)
    return found


@contextmanager
def engine_over(tokenizer, folder=None, pool_options=None, model=None, **options):
    """A running engine on a talking model, with the adapters of a folder."""
    from lora_kit.serve.engine import Engine
    from lora_kit.serve.pool import AdapterPool

    model = talking() if model is None else model
    pool = AdapterPool(model, folder, **(pool_options or {}))
    try:
        with Engine(model, tokenizer, pool, **options) as engine:
            yield engine
    finally:
        pool.close()
