"""What a training step keeps in memory beyond weights and optimiser, engine by engine.

Bytes for B sequences of S tokens (T = B·S, no padding) through L layers, c bytes to a number of
the compute dtype, h hidden, f intermediate, q query and k key-value features, r rank, V vocabulary.
Each formula names the tensors that the backward pass finds again in one layer; they were read off
traces of the allocations of fp16 QLoRA steps.

    plain     a loop around transformers' own loss, adapters as `lora_layer` keeps them
        layer     8h + c(2h + 2q + 2k + 4f + 6r)
                  the norms' inputs in float32 and their outputs; queries, keys, values and what
                  attention returns; gate, silu(gate), up, their product; the adapters' inner
                  products
        loss      12·T·V: logits and their gradient at 2 bytes, log-softmax and its gradient at 4
    native    the same, but keys and values are repeated for each query head (4q in place of
              2q + 2k), for a mask goes with them; logits of 1024 labels at a time, and 4h + 3c·h
              where hidden states are gathered for them. T is what packing makes of the rows:
              sequences of at most 1024 tokens, all as long as the longest, in steps of 128
    trl       peft keeps what `plain` keeps, and where the card has no FlashAttention 3q more in
              float32 and the S×S scores of every head (4·S·heads a token): transformers leaves
              grouped queries to torch, whose other fused kernel does not take them. The loss goes
              through the vocabulary in pieces of 16,384, at 4 bytes
    unsloth   c(4h + 5q + 2f): two norms' outputs and two residual sums; queries, keys and values
              repeated, two copies of attention's result; gate and up (the rest is computed again).
              The loss makes fp16 logits of at most 256 MiB. Its own checkpointing sends each
              layer's input to the CPU; half a dozen copies of one stay

With checkpointing only each layer's input stays, and one layer is computed again: all of it, or
where scores are S×S four of those matrices, whichever is more.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.architectures import Architecture

ENGINES = ("plain", "native", "trl", "unsloth")
# native's: `train.native` and `train.packing` work by these
LABELS_AT_ONCE, PACK_LENGTH, LENGTH_STEP = 1024, 1024, 128
TRL_VOCABULARY = 16_384
UNSLOTH_LOGITS = 256 * 2**20


@dataclass(frozen=True)
class StepBytes:
    """kept: from the forward pass for the backward pass. loss: at the loss itself. again: what one
    layer takes when it is computed again (0 without checkpointing)."""

    kept: int
    loss: int
    again: int


def step_bytes(
    engine: str,
    shape: Architecture,
    rank: int,
    batch: int,
    seq: int,
    c: int,
    checkpointing: bool,
    flash: bool,
) -> StepBytes:
    """The bytes of a step of batch × seq tokens; the module's text has the formulas.

    Args:
        engine: one of `ENGINES`.
        c: bytes to a number of the compute dtype.
        flash: whether the card has FlashAttention.
    """
    tokens = packed_tokens(batch, seq) if engine == "native" else batch * seq
    scores = 0
    if engine == "trl" and not flash and shape.num_heads != shape.num_kv_heads:
        scores = 4 * shape.num_heads * seq * tokens
    layer = tokens * _layer(engine, shape, rank, c, bool(scores)) + scores
    loss = _loss(engine, shape, tokens, c)
    if not checkpointing:
        return StepBytes(shape.num_layers * layer, max(loss, 3 * scores), 0)
    q, h = shape.num_heads * shape.head_dim, shape.hidden_size
    again = max(layer, 4 * scores + tokens * (16 * q + 8 * h)) if scores else layer
    inputs = (6 if engine == "unsloth" else shape.num_layers) * tokens * h * c
    return StepBytes(inputs, loss, again)


def packed_tokens(batch: int, seq: int) -> int:
    """Tokens, padding counted, of `batch` rows of `seq` in the native engine's sequences."""
    together = min(batch, max(1, PACK_LENGTH // seq))
    length = -(-together * seq // LENGTH_STEP) * LENGTH_STEP
    return -(-batch // together) * length


def _layer(engine: str, shape: Architecture, rank: int, c: int, scores: bool) -> int:
    """Bytes of one token in one layer, S×S scores left out."""
    h, f = shape.hidden_size, shape.intermediate_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if engine == "unsloth":
        return c * (4 * h + 5 * q + 2 * f)
    if engine == "native":
        return 8 * h + c * (2 * h + 4 * q + 4 * f + 7 * rank)
    if scores:
        return 8 * h + 12 * q + c * (2 * h + q + 4 * f + 7 * rank)
    return 8 * h + c * (2 * h + 2 * q + 2 * kv + 4 * f + 6 * rank)


def _loss(engine: str, shape: Architecture, tokens: int, c: int) -> int:
    vocabulary = shape.vocab_size
    if engine == "trl":
        return 4 * min(vocabulary, TRL_VOCABULARY) * tokens
    if engine == "unsloth":
        most = UNSLOTH_LOGITS // (c * vocabulary)
        return c * vocabulary * min(tokens, 2 ** (max(1, most).bit_length() - 1))
    if engine == "native":
        gathered = tokens * shape.hidden_size * (4 + 3 * c)
        return 12 * vocabulary * min(tokens, LABELS_AT_ONCE) + gathered
    return 12 * vocabulary * tokens
