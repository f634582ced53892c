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
              repeated, two copies of attention's result; gate and up (the rest is computed again,
              and going back the gradient of their product is c·f more). Its own checkpointing
              sends each layer's input to the CPU; six copies of one stay at the loss, three
              without checkpointing. Its loss is below

With checkpointing only each layer's input stays, and one layer is computed again: all of it, or
where scores are S×S four of those matrices, whichever is more.

Unsloth's loss makes its logits in float32 and writes their gradient into the same bytes. It has two
ways (unsloth_zoo 2026.10.9, fused_losses/fused_linear.py; N labels, R of them at a time):

    chunks    4·R·V, all of the vocabulary for R labels. R is a power of two near N·h/V, no less
              than 512 and 512·151,936/V, no more than 4096
    tiles     4·R·(16,384 + h), a piece of the vocabulary for up to 4096 labels, and the gradient of
              their hidden states in float32. Taken on a GPU of compute capability 8.0 with a
              frozen head of more than 32,768 tokens: always if the GPU has 24.5 GiB or less, from
              4096 labels on if it has more

(and R hidden states gathered). So 8 rows of 512 tokens, 4088 labels, are chunks of 1024 of them for
SmolLM2's vocabulary, 201 MB, and 12 rows of 384, 4596 labels, are tiles, 278 MB.

Two of Unsloth's buffers stand through the run: one for a dequantised weight (kernels/utils.py,
`_scratch`; going back a second weight is dequantised beside it), and the rotary tables of
2·c·head_dim for each position the model can have, not only those in use, since rows without padding
bring their positions (models/llama.py; with padding, at most 32,768 positions).

The adapters' gradients are counted at every moment. Where a step is one batch, trl and Unsloth have
none at the loss (the last step's are gone): such a plan is that much too high if that is the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.architectures import Architecture

ENGINES = ("plain", "native", "trl", "unsloth")
# native's: `train.native` and `train.packing` work by these
LABELS_AT_ONCE, PACK_LENGTH, LENGTH_STEP = 1024, 1024, 128
TRL_VOCABULARY = 16_384
# Unsloth's: labels whose float32 logits are made at once (`least` at a vocabulary of 151,936), the
# pieces of the vocabulary, and the size of GPU (GiB) above which only a long step goes in pieces.
UNSLOTH_LEAST, UNSLOTH_MOST, UNSLOTH_VOCABULARY = 512, 4096, 151_936
UNSLOTH_TILE, UNSLOTH_SMALL_GPU = 16_384, 24.5


@dataclass(frozen=True)
class StepBytes:
    """kept: from the forward pass for the backward pass. loss: at the loss itself. again: what one
    layer takes when it is computed again (0 without checkpointing). tables: held all along."""

    kept: int
    loss: int
    again: int
    tables: int = 0


def step_bytes(
    engine: str,
    shape: Architecture,
    rank: int,
    batch: int,
    seq: int,
    c: int,
    checkpointing: bool,
    flash: bool,
    tiles_from: int | None = None,
) -> StepBytes:
    """The bytes of a step of batch × seq tokens; the module's text has the formulas.

    Args:
        engine: one of `ENGINES`.
        c: bytes to a number of the compute dtype.
        flash: whether the card has FlashAttention.
        tiles_from: labels of a step from which Unsloth's loss is tiled on this card; None: never.
    """
    tokens = packed_tokens(batch, seq) if engine == "native" else batch * seq
    scores = 0
    if engine == "trl" and not flash and shape.num_heads != shape.num_kv_heads:
        scores = 4 * shape.num_heads * seq * tokens
    layer = tokens * _layer(engine, shape, rank, c, bool(scores)) + scores
    q, h = shape.num_heads * shape.head_dim, shape.hidden_size
    if engine == "unsloth":
        # The last token of a row has no label. Full fine-tuning (rank 0) trains the head.
        labels = max(1, batch * (seq - 1))
        loss = unsloth_loss(shape, labels, c, tiles_from if rank else None)
        tables = 2 * c * shape.head_dim * shape.max_position
        if not checkpointing:
            return StepBytes(shape.num_layers * layer + 3 * tokens * h * c, loss, 0, tables)
        again = layer + tokens * shape.intermediate_size * c
        return StepBytes(6 * tokens * h * c, loss, again, tables)
    loss = _loss(engine, shape, tokens, c)
    if not checkpointing:
        return StepBytes(shape.num_layers * layer, max(loss, 3 * scores), 0)
    again = max(layer, 4 * scores + tokens * (16 * q + 8 * h)) if scores else layer
    return StepBytes(shape.num_layers * tokens * h * c, loss, again)


def packed_tokens(batch: int, seq: int) -> int:
    """Tokens, padding counted, of `batch` rows of `seq` in the native engine's sequences."""
    together = min(batch, max(1, PACK_LENGTH // seq))
    length = -(-together * seq // LENGTH_STEP) * LENGTH_STEP
    return -(-batch // together) * length


def unsloth_loss(shape: Architecture, labels: int, c: int, tiles_from: int | None) -> int:
    """Bytes of Unsloth's loss over `labels` labels, in tiles from `tiles_from` of them on."""
    v, h = shape.vocab_size, shape.hidden_size
    if tiles_from is not None and labels >= tiles_from and v > 2 * UNSLOTH_TILE:
        rows = min(labels, UNSLOTH_MOST)
        return rows * (4 * UNSLOTH_TILE + (4 + c) * h)
    least = max(UNSLOTH_LEAST, _power_of_two(UNSLOTH_LEAST * UNSLOTH_VOCABULARY // v))
    rows = min(max(least, _power_of_two(labels * h // v)), UNSLOTH_MOST, labels)
    return rows * (4 * v + (4 + c) * h)


def unsloth_tiles_from(gpu_gib: float, capability_8: bool) -> int | None:
    """Labels from which Unsloth's loss is tiled on a GPU of that size; None: never."""
    if not capability_8:
        return None
    return 0 if gpu_gib <= UNSLOTH_SMALL_GPU else UNSLOTH_MOST


def _power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`; 1 for 0."""
    return 1 << (max(1, number).bit_length() - 1)


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
    if engine == "native":
        gathered = tokens * shape.hidden_size * (4 + 3 * c)
        return 12 * vocabulary * min(tokens, LABELS_AT_ONCE) + gathered
    return 12 * vocabulary * tokens
