"""`python -m lora_kit` is `lora-kit`: torchrun and accelerate start it so."""

from lora_kit.cli import main

if __name__ == "__main__":
    main()
