"""Speech recognition by a mixture of experts on Whisper.

Everything here is of this system alone: its data, model, loss terms, stages, metrics and figures.
It may import shared parts and libraries, never another system. Read `model/mixture.py` first.
transformers, tokenizers, soundfile and jiwer are the extra `stagesweep[speech]`; modules that need
them say so through `extra.py`.
"""
