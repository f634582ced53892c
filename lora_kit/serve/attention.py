"""Attention for one new token a row that reads each key once.

With grouped-query attention g query heads share a head of keys. Transformers copies keys and values
g times wherever there is a mask; with one query token the g heads can stand in the place of g query
tokens instead: the same sum without the copies. All other calls are transformers' own.
(Ainslie et al. 2023, "GQA", section 2.)
"""

from __future__ import annotations

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "lora_kit_rows"


def use_row_attention(model) -> None:
    """Have a model that uses torch's attention (sdpa) use this one; others are left as they are."""
    if model.config._attn_implementation != "sdpa":
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = NAME


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    rows, heads, tokens, size = query.shape
    groups = key.shape[1]
    if tokens != 1 or attention_mask is None or groups == heads:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    folded = query.reshape(rows, groups, heads // groups, size)
    mask = attention_mask.expand(rows, 1, heads // groups, key.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, size), None
