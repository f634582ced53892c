"""The shapes of decoder-only models: enough of a config to count weights and bytes, no download.

Every model of the kit's registry is of the Llama family: token embedding, layers of grouped-query
attention and a gated MLP with two RMS norms, a final norm, and an output layer that may share the
embedding's weights. The shapes are those of the published `config.json` files.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.errors import BadInputError, unknown_name

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = ATTENTION + MLP
HEAD = "lm_head"


@dataclass(frozen=True)
class Architecture:
    """The sizes of one model.

    hidden_size h, intermediate_size f, num_layers L, num_heads and num_kv_heads (queries; keys and
    values), head_dim, vocab_size V. tie_embeddings: the output layer is the embedding. qkv_bias:
    q, k and v carry a bias (Qwen2). max_position: the longest context in tokens.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool = True
    qkv_bias: bool = False
    max_position: int = 2048

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of each linear module of one layer, by name."""
        h, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "gate_proj": (f, h),
            "up_proj": (f, h),
            "down_proj": (h, f),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers' linear modules: what 4-bit loading quantises (biases left out)."""
        return self.num_layers * sum(o * i for o, i in self.linear_shapes().values())

    @property
    def embedding_parameters(self) -> int:
        """The token embedding, and the output layer where it is a matrix of its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """Every parameter: linear modules, their biases, norms (2L + 1 of h), embeddings."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        biases = self.num_layers * qkv if self.qkv_bias else 0
        return self.linear_parameters + self.embedding_parameters + norms + biases

    def lora_parameters(self, rank: int, targets=LINEAR) -> int:
        """rank · (in + out) for each target module of each layer, and once for the output head.

        An adapter on the head has rank · (h + V) parameters, whether or not the head shares the
        embedding's weights: A and B are its own.
        """
        shapes, names = self.linear_shapes(), check_targets(targets)
        layers = self.num_layers * sum(rank * sum(shapes[t]) for t in names if t != HEAD)
        return layers + (rank * (self.hidden_size + self.vocab_size) if HEAD in names else 0)

    @classmethod
    def from_config(cls, config, name: str | None = None) -> Architecture:
        """From a transformers config object, or the dictionary in a `config.json`.

        Raises:
            BadInputError: a size is missing, or the model is not of the Llama family.
        """

        def read(*keys, default=None):
            for key in keys:
                value = config.get(key) if isinstance(config, dict) else getattr(config, key, None)
                if value is not None:
                    return value
            return default

        kind = read("model_type", default="llama")
        if kind not in ("llama", "mistral", "qwen2", "smollm3"):
            raise BadInputError(
                f"The planner knows the Llama family (llama, mistral, qwen2), not {kind!r}."
            )
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [k for k in (*keys, "vocab_size") if read(k) is None]
        if missing:
            raise BadInputError(f"The config lacks {', '.join(missing)}.")
        h, f, layers, heads = (int(read(k)) for k in keys)
        return cls(
            name=name or read("_name_or_path", "name_or_path", default="") or kind,
            hidden_size=h,
            intermediate_size=f,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(read("num_key_value_heads", default=heads)),
            head_dim=int(read("head_dim", default=h // heads)),
            vocab_size=int(read("vocab_size")),
            tie_embeddings=bool(read("tie_word_embeddings", default=False)),
            qkv_bias=kind == "qwen2" or bool(read("attention_bias", default=False)),
            max_position=int(read("max_position_embeddings", default=2048)),
        )


def check_targets(targets) -> tuple[str, ...]:
    """The module names meant by `targets`: "all-linear", "attention", "mlp", a name, or names.
    The output head, "lm_head", is in no group and has to be named.

    Raises:
        UnknownNameError: a name no layer has.
        BadInputError: none at all.
    """
    groups = {"all-linear": LINEAR, "all": LINEAR, "attention": ATTENTION, "mlp": MLP}
    names = targets.replace(" ", "").split(",") if isinstance(targets, str) else list(targets)
    chosen: list[str] = []
    for name in names:
        if name not in groups and name not in (*LINEAR, HEAD):
            raise unknown_name("target module", name, [*LINEAR, HEAD, *groups])
        chosen += [t for t in groups.get(name, (name,)) if t not in chosen]
    if not chosen:
        raise BadInputError("No target modules: name at least one, or 'all-linear'.")
    return tuple(chosen)


def _llama(name, h, f, layers, heads, kv, vocab, tied, context, head_dim=None, qkv_bias=False):
    return Architecture(
        name, h, f, layers, heads, kv, head_dim or h // heads, vocab, tied, qkv_bias, context
    )


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        _llama("smollm2-135m", 576, 1536, 30, 9, 3, 49152, True, 8192),
        _llama("smollm2-360m", 960, 2560, 32, 15, 5, 49152, True, 8192),
        _llama("smollm2-1.7b", 2048, 8192, 24, 32, 32, 49152, True, 8192),
        _llama("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128256, True, 131072),
        _llama("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128256, True, 131072),
        _llama("tinyllama-1.1b", 2048, 5632, 22, 32, 4, 32000, False, 2048),
        _llama("qwen2.5-0.5b", 896, 4864, 24, 14, 2, 151936, True, 32768, qkv_bias=True),
        _llama("qwen2.5-1.5b", 1536, 8960, 28, 12, 2, 151936, True, 32768, qkv_bias=True),
        _llama("mistral-7b-v0.3", 4096, 14336, 32, 32, 8, 32768, False, 32768),
        _llama("llama-2-7b", 4096, 11008, 32, 32, 32, 32000, False, 4096),
        _llama("llama-65b", 8192, 22016, 80, 64, 64, 32000, False, 2048),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture called `name`; "-instruct", "-chat" and "-it" endings are looked through.

    Raises:
        UnknownNameError: none such.
    """
    key = str(name).lower()
    for ending in ("-instruct", "-chat", "-it", "-base"):
        key = key.replace(ending, "")
    if key not in ARCHITECTURES:
        raise unknown_name("model architecture", name, ARCHITECTURES)
    return ARCHITECTURES[key]
