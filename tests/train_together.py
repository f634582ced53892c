"""What every process of tests/test_train_processes.py runs: MODEL ROWS OUTPUT."""

import json
import sys

import torch

from lora_kit.data import Dataset
from lora_kit.train import TrainSpec, finetune
from lora_kit.train.processes import processes

SPEC = dict(rank=4, alpha=8, batch_size=5, accumulation=2, steps=5, learning_rate=1e-2)
SPEC |= dict(dtype="float32", warmup=0.0)


def rows_of(path):
    with open(path) as f:
        return Dataset("sums", "train", tuple(json.load(f)), "made", "v1")


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, rows, output = sys.argv[1:]
    result = finetune(model, rows_of(rows), TrainSpec(**SPEC), output=output, engine="native")
    crew = processes()
    # Written side by side: each process has a file of its own.
    with open(f"{output}.{crew.index}.json", "w") as f:
        facts = {"count": crew.count, "losses": result.losses, "tokens": result.tokens}
        json.dump(facts | {"trained": result.trained_tokens}, f)
