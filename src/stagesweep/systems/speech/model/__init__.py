"""Models of this system: Whisper with a gate and LoRA experts.

May import `base` and the specs of the system's data, but no loss and no stage. Read `mixture.py`
first; it uses `lora.py` (adapters) and `gate.py`.
"""
