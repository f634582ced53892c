"""LoRA's relatives, small and exact, to compare it with: three older ways to train a little.

    adapter layers   y ← y + U · gelu(D y) after every attention and MLP block (Houlsby et al.
                     2019, section 2.1): new layers in series, so inference pays for them
    prefix tuning    trained keys and values that every position may attend to (Li and Liang 2021,
                     section 4.2): the context grows, so inference pays for that
    last layers      the top of the network trains, the rest is frozen: nothing is added and
                     nothing is to be paid, but only the top can change

All freeze the base and are trained with an ordinary loop over the parameters that require a
gradient. Adapter layers start as the base's own function, a prefix as a few tokens in front.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lora_kit.errors import BadInputError
from lora_kit.lora_state import swap_module
from lora_kit.lora_targets import canonical_name, linear_layers

# The last linear layer of an attention or MLP block: what it gives is what the residual receives.
SUBLAYER_ENDS = ("o_proj", "down_proj", "out_proj", "fc2", "attention.output.dense", "output.dense")


class AdapterLayer(nn.Module):
    """A linear layer followed by a bottleneck: y = W x, then y + U · gelu(D y).

    D (width, out) is random, U (out, width) zero, so it starts as W x. Shapes: (..., in) to
    (..., out). Parameters: out · (2 · width + 1) + width, biases included.
    """

    def __init__(self, base_layer: nn.Module, width: int, generator=None):
        super().__init__()
        self.base_layer = base_layer
        size = base_layer.out_features
        self.down = nn.Linear(size, width)
        self.up = nn.Linear(width, size)
        with torch.no_grad():
            self.down.weight.normal_(std=size**-0.5, generator=generator)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        return y + self.up(F.gelu(self.down(y.to(self.down.weight.dtype)))).to(y.dtype)


def add_adapter_layers(model: nn.Module, width: int, seed: int | None = None) -> nn.Module:
    """Put an `AdapterLayer` of this width after every attention and MLP block; freeze the rest.

    Returns the same model. Raises BadInputError on a width below 1, a model where no such block is
    found, or one that has adapter layers already.
    """
    if not isinstance(width, int) or width < 1:
        raise BadInputError(f"width must be a whole number of at least 1, not {width!r}.")
    if any(isinstance(m, AdapterLayer) for m in model.modules()):
        raise BadInputError("This model has adapter layers already: remove_adapter_layers first.")
    ends = {
        path: layer
        for path, layer in linear_layers(model).items()
        if any(path == end or path.endswith("." + end) for end in SUBLAYER_ENDS)
    }
    if not ends:
        raise BadInputError(
            f"No attention or MLP output ({', '.join(SUBLAYER_ENDS)}) in this "
            f"{type(model).__name__}: adapter layers have nowhere to go."
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    _freeze(model)
    device = next(model.parameters()).device
    for path, layer in ends.items():
        swap_module(model, path, AdapterLayer(layer, width, generator).to(device))
    return model


def remove_adapter_layers(model: nn.Module) -> None:
    """Take the adapter layers out; the base is what it was."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, AdapterLayer)]
    for path, layer in found:
        swap_module(model, canonical_name(path), layer.base_layer)
    _thaw(model)


class PrefixTuned(nn.Module):
    """A decoder-only language model behind trained keys and values.

    prefix: (layers, 2, key-value heads, length, head size), the same for every row of a batch.
    Called as the model is; a mask is widened and positions shifted by `length`.
    """

    def __init__(self, model: nn.Module, length: int, seed: int | None = None):
        super().__init__()
        config = getattr(model, "config", None)
        if getattr(config, "num_key_value_heads", None) is None:
            raise BadInputError(
                f"Prefix tuning needs a decoder with keys and values, not {type(model).__name__}."
            )
        if not isinstance(length, int) or length < 1:
            raise BadInputError(f"length must be a whole number of at least 1, not {length!r}.")
        _freeze(model)
        self.model, self.config = model, config
        head = getattr(config, "head_dim", None)
        head = head or config.hidden_size // config.num_attention_heads
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        ids = torch.randint(config.vocab_size, (1, length), generator=generator)
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, length, head)
        self.prefix = nn.Parameter(torch.empty(shape))
        self.start_from(ids)

    @torch.no_grad()
    def start_from(self, ids: torch.Tensor) -> None:
        """Set the prefix to the keys and values of real tokens, (1, length): the start that works
        best with few examples (Li and Liang, section 7.4)."""
        device = next(self.model.parameters()).device
        cache = self.model(ids.to(device), use_cache=True).past_key_values
        for layer, held in enumerate(cache.layers):
            self.prefix[layer, 0].copy_(held.keys[0])
            self.prefix[layer, 1].copy_(held.values[0])
        self.prefix.data = self.prefix.data.to(device)

    def forward(self, input_ids, attention_mask=None, **options):
        from transformers import DynamicCache

        rows, length = input_ids.shape[0], self.prefix.shape[3]
        dtype = next(self.model.parameters()).dtype
        cache = DynamicCache(config=self.config)
        for layer, (keys, values) in enumerate(self.prefix.to(dtype)):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        seen = attention_mask.new_ones(rows, length)
        mask = torch.cat([seen, attention_mask], dim=1)
        return self.model(input_ids, attention_mask=mask, past_key_values=cache, **options)


def tune_last_layers(model: nn.Module, blocks: int = 1) -> nn.Module:
    """Freeze all but the last `blocks` transformer blocks (and the norm after them).

    Returns the same model. Raises BadInputError when there are no such blocks or too few.
    """
    stack = _block_stack(model)
    if not isinstance(blocks, int) or not 1 <= blocks <= len(stack):
        raise BadInputError(f"blocks must lie between 1 and {len(stack)}, not {blocks!r}.")
    _freeze(model)
    for block in stack[-blocks:]:
        block.requires_grad_(True)
    for path, module in model.named_modules():
        parts = path.split(".")
        if parts[-1] in ("norm", "ln_f", "final_layer_norm") and "layers" not in parts:
            module.requires_grad_(True)
    return model


def _block_stack(model: nn.Module) -> nn.ModuleList:
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        raise BadInputError(f"{type(model).__name__} has no stack of blocks to take the last of.")
    return max(stacks, key=lambda s: sum(p.numel() for p in s.parameters()))


def _freeze(model: nn.Module) -> None:
    model._family_thawed = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)


def _thaw(model: nn.Module) -> None:
    for parameter in getattr(model, "_family_thawed", []):
        parameter.requires_grad_(True)
