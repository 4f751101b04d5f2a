"""The commands of `python -m lora_quax`: one a file, and what they share."""
