"""The inside of the sandbox: what runs in the child, with the standard library alone.

`lora_kit.evaluate.sandbox` starts a bare interpreter that imports this folder as `jail`; nothing
here may import anything of the kit or of site-packages.
"""
