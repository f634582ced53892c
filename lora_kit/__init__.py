"""lora_kit: learn LoRA and QLoRA by running them, and check what papers say about them.

Importing the package imports nothing heavy: torch, transformers and their like are imported inside
the functions that need them. Modules are named by concept; `lora_kit/README.md` shows how they
stand on each other.
"""

__version__ = "0.1.0"
