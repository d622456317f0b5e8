"""Measurements of lora_inject; run them with ``python -m benchmarks``."""
