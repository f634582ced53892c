"""The fast model against lm-eval's own: the same numbers for the same requests."""

import random
import types

import numpy as np
import pytest
import torch
from lora_fixtures import tiny_llama

from lora_kit.evaluate.sharing import plan_runs, shared_runs

WORDS = "the cat sat on a mat and 12 dogs ran, far away.  Éa\n\nQuestion: yes".split(" ")


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def make_model(tokenizer, **options):
    torch.manual_seed(0)
    settings = dict(vocab_size=300, max_position_embeddings=256, initializer_range=0.2)
    settings |= dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return tiny_llama(**settings | dict(bos_token_id=None) | options).eval()


def ask(kind, *arguments):
    """What lm-eval hands to a model, as far as a model looks."""
    return types.SimpleNamespace(args=arguments, request_type=kind)


def text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def requests(seed=0, contexts=12):
    """Shared prefixes, shared contexts, one-token and long endings, spaces at the seam, no
    context, and texts beyond 256 tokens."""
    rng = random.Random(seed)
    shots = [text(rng, 30) + "\n\n", text(rng, 20) + "\n\n", ""]
    asked = []
    for i in range(contexts):
        context = rng.choice(shots) + text(rng, rng.randint(1, 12)) + rng.choice(["", " ", "\n "])
        endings = [" A", " B", " C"] if i % 3 == 0 else [" " + text(rng, k) for k in (1, 4, 9)]
        asked += [ask("loglikelihood", context, ending) for ending in endings]
    asked.append(ask("loglikelihood", "", "the cat"))
    asked.append(ask("loglikelihood", text(rng, 150), " a mat"))
    asked.append(ask("loglikelihood", text(rng, 150), " a dog"))
    rng.shuffle(asked)
    return asked


def hflm(model, tokenizer, **options):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4} | options)


def fast(model, tokenizer, row=128, batch=512, run_cost=16, logit_bytes=2**16, **options):
    from lora_kit.evaluate.fast_model import FastLM
    from lora_kit.evaluate.fast_sizes import Sizes

    return FastLM(model, tokenizer, sizes=Sizes(row, batch, run_cost, logit_bytes), **options)


# Planning


@pytest.mark.parametrize("seed", range(30))
def test_runs_are_disjoint_and_save_no_less_than_the_best_of_them_alone(seed):
    rng = random.Random(seed)
    common = [rng.choice((0, 1, 2, 5, 9, 30)) for _ in range(rng.randint(0, 14))]
    cost = rng.choice((0, 3, 10, 40))
    intervals = [(i, j) for i in range(len(common) + 1) for j in range(i + 2, len(common) + 2)]
    saves = {(i, j): (j - i - 1) * min(common[i : j - 1]) - cost for i, j in intervals}
    runs = shared_runs(common, cost)
    for low, high, depth in runs:
        assert depth == min(common[low : high - 1])
        assert saves[low, high] > 0
    ends = [end for low, high, _ in runs for end in (low, high)]
    assert ends == sorted(ends)
    assert sum(saves[low, high] for low, high, _ in runs) >= max([0, *saves.values()])


def test_every_request_reads_exactly_its_own_tokens():
    """Follow what each token may see, and it must be the request's text, in order."""
    rng = random.Random(1)
    shots = [rng.randrange(50) for _ in range(40)]
    asked = []
    for _ in range(30):
        context = rng.choice((shots, shots[:20], [])) + [rng.randrange(50) for _ in range(7)]
        for size in (1, 1, 3, 8):
            asked.append((context, [rng.randrange(50) for _ in range(size)]))
    seen = set()
    for run in plan_runs(asked, max_length=45, row_tokens=100, run_cost=10):
        for row in run.rows:
            for number in np.unique(row.request):
                assert number not in seen
                seen.add(number)
                context, continuation = asked[number]
                whole = (context + continuation)[-46:]
                mine = row.request == number
                assert row.target[mine].tolist() == continuation
                for k, at in enumerate(row.at[mine]):
                    j = np.arange(at + 1)
                    visible = row.trunks[j] == row.trunks[at]
                    visible &= (row.branches[j] == 0) | (row.branches[j] == row.branches[at])
                    read = [*run.prefix, *row.tokens[j[visible]]]
                    assert read == whole[: len(whole) - len(continuation) + k]
                    assert row.positions[j[visible]].tolist() == [
                        *range(len(run.prefix), len(read))
                    ]
    assert seen == set(range(len(asked)))


def test_a_shared_beginning_is_read_once():
    shots = list(range(100))
    asked = [([*shots, 200 + i], [7]) for i in range(20) for _ in range(4)]
    (run,) = plan_runs(asked, max_length=500, row_tokens=8, run_cost=16)
    assert run.prefix.tolist() == shots
    assert sum(map(len, run.rows)) == 20
    (run,) = plan_runs(asked, max_length=500, row_tokens=8, run_cost=10_000)
    assert len(run.prefix) == 0
    assert sum(map(len, run.rows)) == 20 * 101


# Likelihoods


@pytest.mark.parametrize("sizes", [{}, {"row": 1, "batch": 1}, {"row": 4096, "run_cost": 10**9}])
def test_likelihoods_and_greedy_flags_are_those_of_hflm(model, tokenizer, sizes):
    asked = requests()
    # Answers the model itself would give, so that some flags are true.
    for context in ("the cat sat", "dogs ran"):
        ids = tokenizer(context, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            answer = model(ids).logits[0, -1].argmax()
        asked.append(ask("loglikelihood", context, tokenizer.decode([answer])))
    theirs = hflm(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    ours = fast(model, tokenizer, **sizes).loglikelihood(asked, disable_tqdm=True)
    assert [b[1] for b in ours] == [a[1] for a in theirs]
    assert any(a[1] for a in theirs)
    np.testing.assert_allclose([b[0] for b in ours], [a[0] for a in theirs], atol=1e-3)


def test_token_boundaries_are_those_of_lm_eval(model, tokenizer, llama_tokenizer):
    for some in (tokenizer, llama_tokenizer):
        pairs = [r.args for r in requests(3) if r.args[0]]
        if some is llama_tokenizer:
            pairs.append(("<s>the cat", " sat"))  # no second BOS
        lm = fast(model, some)
        for pair, (context, continuation) in zip(pairs, lm._encode_pairs(pairs), strict=True):
            expected = lm._encode_pair(*pair)
            assert (context.tolist(), continuation.tolist()) == tuple(map(list, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_as_hflm_does(tokenizer, dtype):
    model = make_model(tokenizer).to(dtype)
    asked = requests(5)
    theirs = hflm(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    ours = fast(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
    step = torch.finfo(dtype).eps
    for a, b in zip(theirs, ours, strict=True):
        assert b[0] == pytest.approx(a[0], rel=8 * step, abs=8 * step)
    exact = fast(model, tokenizer, softmax_dtype="float32").loglikelihood(asked)
    assert len({round(x, 6) for x, _ in exact}) >= len({round(x, 6) for x, _ in ours})


def test_rolling_likelihoods_are_those_of_hflm(model, tokenizer):
    rng = random.Random(2)
    asked = [ask("loglikelihood_rolling", text(rng, n)) for n in (1, 30, 200, 400)]
    theirs = hflm(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    ours = fast(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_an_adapter_is_part_of_the_model(tokenizer):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(make_model(tokenizer), config).eval()
    asked = requests(4, contexts=4)
    plain = hflm(make_model(tokenizer), tokenizer).loglikelihood(asked, disable_tqdm=True)
    for adapted in (True, False):
        with torch.no_grad():
            if adapted:
                theirs = hflm(tuned, tokenizer).loglikelihood(asked, disable_tqdm=True)
                ours = fast(tuned, tokenizer).loglikelihood(asked)
            else:
                theirs = plain
                with tuned.disable_adapter():
                    ours = fast(tuned, tokenizer).loglikelihood(asked)
        np.testing.assert_allclose([b[0] for b in ours], [a[0] for a in theirs], atol=1e-3)


def test_too_large_a_batch_is_halved(model, tokenizer, monkeypatch):
    asked = requests(6)
    expected = fast(model, tokenizer).loglikelihood(asked)
    lm = fast(model, tokenizer, row=64, batch=10**6)
    score, refused = lm._score, []

    def small_memory(rows, *rest):
        if len(rows) > 2:
            refused.append(len(rows))
            raise torch.cuda.OutOfMemoryError
        score(rows, *rest)

    monkeypatch.setattr(lm, "_score", small_memory)
    found = lm.loglikelihood(asked)
    assert refused
    np.testing.assert_allclose([a[0] for a in found], [a[0] for a in expected], atol=1e-4)


def test_models_it_cannot_take(tokenizer, model):
    from transformers import GPT2Config, GPT2LMHeadModel

    from lora_kit.evaluate.fast_sizes import why_not_fast

    assert why_not_fast(model) is None
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    assert "gpt2" in why_not_fast(gpt2)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert "positions" in why_not_fast(make_model(tokenizer, rope_parameters=dynamic))


# Generation


def generation(seed=0, prompts=11, **options):
    rng = random.Random(seed)
    options = {"until": [], "max_gen_toks": 30, "do_sample": False} | options
    return [ask("generate_until", text(rng, rng.randint(1, 40)), options) for _ in range(prompts)]


def answers(lm, asked):
    return lm.generate_until(asked, disable_tqdm=True)


def test_answers_are_those_of_hflm(model, tokenizer):
    asked = generation()
    theirs = answers(hflm(model, tokenizer), asked)
    assert len(set(theirs)) > 5
    assert answers(fast(model, tokenizer), asked) == theirs
    small = fast(model, tokenizer, batch=50)
    assert answers(small, asked) == theirs
    assert model.config._attn_implementation == "sdpa"


def test_stop_texts_and_ends_finish_a_row(model, tokenizer):
    asked = generation()
    whole = answers(hflm(model, tokenizer), asked)
    # Something most answers contain, early or late, and a token many of them reach.
    letters = sorted({c for text in whole for c in text if c.isprintable()})
    common = max(letters, key=lambda c: sum(c in t for t in whole))
    asked = generation(until=[common, "no such text"])
    theirs = answers(hflm(model, tokenizer), asked)
    assert theirs != whole
    assert answers(fast(model, tokenizer), asked) == theirs
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in whole]
    ending = make_model(tokenizer)
    ending.generation_config.eos_token_id = [tokenizer.eos_token_id, ids[0][4], ids[1][9]]
    theirs = answers(hflm(ending, tokenizer), generation())
    assert theirs != whole
    assert answers(fast(ending, tokenizer), generation()) == theirs


def test_finished_rows_leave(model, tokenizer, monkeypatch):
    from lora_kit.evaluate import fast_generation

    asked = generation(max_gen_toks=60)
    whole = answers(hflm(model, tokenizer), asked)
    ending = make_model(tokenizer)
    third = tokenizer(whole[3], add_special_tokens=False)["input_ids"][3]
    ending.generation_config.eos_token_id = [tokenizer.eos_token_id, third]
    rows, attend = [], fast_generation._attend

    def watch(module, query, *rest, **options):
        rows.append(len(query))
        return attend(module, query, *rest, **options)

    monkeypatch.setattr(fast_generation, "_attend", watch)
    assert answers(fast(ending, tokenizer), asked) == answers(hflm(ending, tokenizer), asked)
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0] == len(asked)


def test_long_prompts_lose_their_beginning(model, tokenizer, caplog):
    rng = random.Random(3)
    options = {"until": [], "max_gen_toks": 20, "do_sample": False}
    asked = [ask("generate_until", text(rng, n), options) for n in (2, 150, 200)]
    theirs = answers(hflm(model, tokenizer, batch_size=1), asked)
    assert answers(fast(model, tokenizer), asked) == theirs


def test_what_is_not_plain_greedy_is_left_to_hflm(tokenizer):
    model = make_model(tokenizer)
    model.generation_config.repetition_penalty = 1.5
    asked = generation()
    theirs = answers(hflm(model, tokenizer), asked)
    assert answers(fast(model, tokenizer), asked) == theirs
    assert theirs != answers(fast(make_model(tokenizer), tokenizer), asked)


def test_progress_is_told(model, tokenizer):
    told = []
    lm = fast(model, tokenizer, on_progress=lambda done, asked: told.append((done, asked)))
    lm.loglikelihood(requests())
    assert told[-1][0] == told[-1][1] == len(requests())
    answers(lm, generation())
    assert told[-1] == (11, 11)


# Packed layers


@pytest.mark.parametrize("library", ["none", "peft", "lora_kit", "lora_kit, dora"])
def test_packed_layers_and_adapters_give_the_same(tokenizer, monkeypatch, library):
    from lora_kit import packed_linear

    if packed_linear.packed_speed() == 0:
        pytest.skip("this build of torch has no packed linear layer")
    model = make_model(tokenizer)
    torch.manual_seed(1)
    if library == "peft":
        from peft import LoraConfig, get_peft_model

        options = dict(target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, **options)).eval()
    elif library != "none":
        from lora_kit.lora import LoraSpec, add_lora

        add_lora(model, LoraSpec(rank=4, alpha=16, dora="dora" in library), seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.3)
    asked = requests(8, contexts=30)
    with torch.no_grad():
        theirs = hflm(model, tokenizer).loglikelihood(asked, disable_tqdm=True)
        written = answers(hflm(model, tokenizer), generation())
    plain = hflm(make_model(tokenizer), tokenizer).loglikelihood(asked, disable_tqdm=True)
    assert (plain != theirs) == (library != "none")
    monkeypatch.setattr(packed_linear, "packed_speed", lambda: 2.0)
    monkeypatch.setattr(packed_linear, "TOKENS_FROM", 1)
    lm = fast(model, tokenizer)
    ours = lm.loglikelihood(asked)
    np.testing.assert_allclose([b[0] for b in ours], [a[0] for a in theirs], atol=1e-3)
    assert [b[1] for b in ours] == [a[1] for a in theirs]
    assert answers(lm, generation()) == written
    with lm._packed(10) as count:
        assert count == 2 * 7 * (3 if library == "peft" else 1) + 1
