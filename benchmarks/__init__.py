"""Measurements of lora_quax against its peers: `python -m benchmarks`."""
