"""Speech recognition by a mixture of experts on Whisper.

Contains data, simulator, models, losses, stages, metrics and figures of this system. May import the
shared parts and everything below, but no other system. Read `data/dataset.py` first, then
`model/mixture.py`.
"""
