"""Every test has a cache of its own and no network; two markers ask for what lies outside."""

import json
import os

import pytest

# Read by the hub's library when it is imported: no test waits for a network that is not there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# A plain run would have the kit read these from the caller's environment.
SWITCHES = ("LORA_KIT_PARAMS", "LORA_KIT_T4_RULES", "LORA_KIT_FIGURES")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
)


def pytest_configure(config):
    config.addinivalue_line("markers", "data: reads real rows from the folder LORA_KIT_DATA names")


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason="LORA_KIT_DATA names no folder of real rows")
    for item in items:
        if item.get_closest_marker("data") and "LORA_KIT_DATA" not in os.environ:
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def _own_surroundings(request, tmp_path_factory, monkeypatch):
    """An empty LORA_KIT_HOME, except where a test asks for the real model or runs a notebook."""
    for switch in SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    asks = request.node.get_closest_marker
    if not (asks("model") or asks("notebook")):
        monkeypatch.setenv("LORA_KIT_HOME", str(tmp_path_factory.mktemp("home")))
    if not asks("data"):
        monkeypatch.delenv("LORA_KIT_DATA", raising=False)


@pytest.fixture
def home(monkeypatch, tmp_path):
    """This test's LORA_KIT_HOME."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LORA_KIT_HOME", str(folder))
    return folder


def byte_tokenizer(llama=False):
    """Byte-level BPE trained here: ChatML, or Llama's way of writing BOS before any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"] if llama else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(models.BPE(unk_token="<unk>" if llama else None))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["user assistant reverse below is an instruction"] * 3, trainer)
    if llama:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
        names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    else:
        names = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    tokenizer.chat_template = LLAMA_CHAT if llama else CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """A tiny ChatML tokenizer. Do not change it: it is shared."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def llama_tokenizer():
    """A tiny tokenizer that writes BOS before any text, as its chat template does too."""
    return byte_tokenizer(llama=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A randomly initialised Llama of 2 layers with its tokenizer, saved as users save theirs."""
    from lora_fixtures import tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Large initial weights, so that greedy answers differ from prompt to prompt.
    tiny_llama(
        vocab_size=300, eos_token_id=eos, pad_token_id=pad, bos_token_id=None, initializer_range=0.3
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    """The tiny model, loaded afresh: a test may change it."""
    from lora_kit.models import load_model

    return load_model(str(tiny_folder), "float32")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache without a network. `add(hub_id, source, commit)` puts a folder's files
    there as a finished download leaves them."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(hub_id, source, commit, leave_out=()):
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in source.iterdir():
            if path.name not in leave_out:
                (snapshot / path.name).write_bytes(path.read_bytes())
        return snapshot

    add.cache = cache
    return add


@pytest.fixture
def write_rows():
    """Write rows as JSON lines, gzipped where the name ends in .gz."""
    import gzip

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    return write


@pytest.fixture
def fake_gpu(monkeypatch):
    """Make torch report a GPU that is not there: `fake_gpu(name, capability, total_bytes)`."""
    import types

    import torch

    calls = {}

    def become(name, capability, total):
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(cuda, "mem_get_info", lambda *_: (total - 2**30, total))
        monkeypatch.setattr(
            cuda, "get_device_properties", lambda *_: types.SimpleNamespace(total_memory=total)
        )
        monkeypatch.setattr(
            cuda, "set_per_process_memory_fraction", lambda part: calls.update(fraction=part)
        )
        for kind in ("flash", "cudnn"):
            monkeypatch.setattr(
                torch.backends.cuda,
                f"enable_{kind}_sdp",
                lambda on, kind=kind: calls.update({kind: on}),
            )
        return calls

    return become


@pytest.fixture(params=["isolated", "limits"])
def mode(request, monkeypatch):
    """Both ways to run a program in the sandbox; the second as where no namespace can be had."""
    from lora_kit.evaluate import sandbox

    if request.param == "isolated":
        missing = sandbox.missing_isolation()
        if missing:
            pytest.skip(f"this machine cannot isolate a program: {missing}")
    else:
        monkeypatch.setattr(sandbox, "missing_isolation", lambda: "a test asks for it")
    return request.param
