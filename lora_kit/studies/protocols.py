"""What each paper did, what it leaves out, and what of it this kit can run, and where."""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.studies.papers import known_paper

CARDS = ("t4", "a10g", "a100-40gb", "a100-80gb")


@dataclass(frozen=True)
class Protocol:
    """What a paper says it did; `unsaid`: what somebody who wants to repeat it has to guess."""

    models: str
    data: str
    method: str
    scores: str
    unsaid: str


@dataclass(frozen=True)
class Rerun:
    """One experiment: how this kit runs it, and what of it fits a laptop, a T4, or takes more."""

    what: str
    how: str
    laptop: str
    t4: str
    more: str


PROTOCOLS: dict[str, Protocol] = {
    "saha2024": Protocol(
        models="Llama-3.2-1B-Instruct (and 3B for code); compared with 3B and Mistral-7B",
        data="14,500 Alpaca rows; 12,500 maths problems or GSM8K; Dolly",
        method="LoRA, alpha 16, ranks 16 to 128, on attention, MLP or both",
        scores="HumanEval pass@1, pass@10; CNN/DailyMail ROUGE; HellaSwag; GSM8K",
        unsaid="learning rate, batch, epochs, seeds, number of completions, rows of each test",
    ),
    "mai2025": Protocol(
        models="Llama 3.2 1B, TinyLlama 1.1B",
        data="Alpaca, 2,000 and 50,000 rows",
        method="QLoRA with Unsloth on a Colab T4",
        scores="GSM8K, HellaSwag and MMLU's computer science, by lm-eval",
        unsaid="rank, alpha, learning rate, batch, epochs, seeds, which of two subjects",
    ),
    "oswal2025": Protocol(
        models="SmolLM2 360M and 1.7B, Llama 3.2 1B scored; SmolLM and Llama 3.2 3B tuned",
        data="ECInstruct, ten e-commerce tasks",
        method="QLoRA by peft, 9.4M to 26.4M trainable parameters",
        scores="F1*, macro-F1, F1, HR@1, accuracy, NDCG, BERTScore; in and out of domain",
        unsaid="rank, targets, learning rate, batch, epochs, hardware, time, gains of NDCG",
    ),
    "zhao2024": Protocol(
        models="ten bases of 2.5B to 8.5B",
        data="31 tasks, 635 to 560,000 training rows",
        method="4-bit LoRA, rank 8, 40,000 steps of one row, rate 0.002, one A10G",
        scores="accuracy, ROUGE-L, 1 - MAE, HumanEval on up to 1,000 rows; LoRAX latencies",
        unsaid="alpha, targets, seeds, spread of latencies, requests sent",
    ),
    "alwadhi2024": Protocol(
        models="LLaMA 2 7B; GPT-4o as teacher",
        data="GPT-4o's questions for two MMLU subjects; sums of 1 to 7 digits",
        method="QLoRA, rank 32, dropout 0.1, NF4, one epoch, one T4",
        scores="accuracy on 112 and 612 questions; sums of 1 to 12 digits, three readings",
        unsaid="alpha, targets, learning rate, batch, number of rows, generated or tested",
    ),
}

RERUNS: dict[str, tuple[Rerun, ...]] = {
    "saha2024": (
        Rerun(
            "rank and placement",
            "lora-kit sweep specialists; notebooks 02 and 07",
            "the question, 0.25M weights",
            "the grid, SmolLM2-135M; Llama-3.2-1B, a cell at a time",
            "the paper's whole grid",
        ),
        Rerun(
            "code", "lora_kit.evaluate, sandboxed HumanEval", "a few problems", "164 problems", ""
        ),
        Rerun("swapped adapters", "notebook 05; lora-kit serve", "all", "all", ""),
    ),
    "mai2025": (
        Rerun(
            "tuning on 2,000 Alpaca rows",
            "lora-kit finetune --recipe mai; notebook 03",
            "SmolLM2-135M",
            "Llama 3.2 1B",
            "",
        ),
        Rerun(
            "what is forgotten",
            "benchmarks/forgetting.py; notebook 06",
            "small map",
            "whole benchmarks, SmolLM2-135M",
            "GSM8K with Llama 3.2 1B",
        ),
    ),
    "oswal2025": (
        Rerun(
            "query ranking", "benchmarks/published_data.py", "all, from published answers", "", ""
        ),
        Rerun("trainable parameters", "notebook 02", "all", "", ""),
        Rerun("tuning on ECInstruct", "lora-kit run 08 -f oswal2025-…", "", "all models", ""),
        Rerun("product matching", "notebook 08", "free methods", "SmolLM2-135M", ""),
    ),
    "zhao2024": (
        Rerun("summaries and regressions", "notebook 09", "all", "", ""),
        Rerun(
            "many models, many tasks",
            "benchmarks/lora_land_mini.py; notebook 09",
            "",
            "a miniature, SmolLM2-135M",
            "7B models, 40,000 steps each",
        ),
        Rerun("many adapters at once", "notebook 05; lora-kit serve", "all", "all", "7B, 50 users"),
    ),
    "alwadhi2024": (
        Rerun(
            "sums by length",
            "benchmarks/addition_lengths.py; notebook 10",
            "1-2 of 5 digits, SmolLM2-135M",
            "1-7 of 14 digits, SmolLM2-135M",
            "",
        ),
        Rerun("MMLU from a teacher", "", "", "", "a teacher's answers"),
    ),
}
# (architecture, rank, quantisation) of each paper's largest own model or models.
MODELS: dict[str, tuple[tuple[str, int, str], ...]] = {
    "saha2024": (("llama-3.2-1b", 128, "none"), ("llama-3.2-3b", 128, "none")),
    "mai2025": (("llama-3.2-1b", 16, "nf4-double"), ("tinyllama-1.1b", 16, "nf4-double")),
    "oswal2025": (("smollm2-1.7b", 16, "nf4-double"), ("llama-3.2-3b", 16, "nf4-double")),
    "zhao2024": (("mistral-7b-v0.3", 8, "nf4-double"),),
    "alwadhi2024": (("llama-2-7b", 32, "nf4-double"),),
}


def card_needed(paper: str, batch: int = 1, seq: int = 512) -> list[dict]:
    """The memory a paper's own training takes, planned, and the smallest card that has it.

    Returns:
        A row a model: model, rank, weights, GiB (on a T4), card ("more": none of `CARDS`).

    Raises:
        UnknownNameError: no such paper.
    """
    from lora_kit.architectures import architecture
    from lora_kit.memory import plan_memory

    rows = []
    for name, rank, quantization in MODELS[known_paper(paper)]:
        plans = {
            card: plan_memory(
                architecture(name), rank, batch=batch, seq=seq, quantization=quantization, gpu=card
            )
            for card in CARDS
        }
        card = next((card for card, plan in plans.items() if plan.fits), "more")
        rows.append(
            {
                "model": name,
                "rank": rank,
                "weights": "16 bits" if quantization == "none" else "4 bits",
                "GiB": round(plans["t4"].total_bytes / 2**30, 1),
                "card": card,
            }
        )
    return rows
