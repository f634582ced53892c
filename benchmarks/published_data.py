"""What the papers' own data say: benchmark sizes, and Oswal et al.'s rankings scored again.

    LORA_KIT_DATA=folder python benchmarks/published_data.py

Reads the sets by the kit's registry and `ecinstruct_qpr/` from the folder LORA_KIT_DATA names, and
writes data/results/published_data/published_data.json. No model, no GPU, under a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/results"))
    args = parser.parse_args()
    from lora_kit.notebook import describe
    from lora_kit.studies.published_data import STUDY, measure
    from lora_kit.studies.records import write_record

    record = measure()
    for name, metric in record.metrics.items():
        value = metric if isinstance(metric, float) else metric.model_dump(exclude_none=True)
        print(f"{name} = {describe(value)}")
    for row in record.tables["differences"]:
        print(f"{row['pair']}: {row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]")
    print(write_record(record, args.out / STUDY / f"{STUDY}.json"))


if __name__ == "__main__":
    main()
