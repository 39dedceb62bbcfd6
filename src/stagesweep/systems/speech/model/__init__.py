"""Whisper with a gate and a mixture of LoRA experts. Read `mixture.py` first."""
