"""What the tests of the harness share: a tokenizer of bytes, a tiny model."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer(extra=()):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<eos>", "<pad>", *alphabet, *extra])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    settings = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=258)
    settings |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    settings |= dict(eos_token_id=0, pad_token_id=1, bos_token_id=0, initializer_range=0.2)
    return LlamaForCausalLM(LlamaConfig(**settings | options)).eval()
