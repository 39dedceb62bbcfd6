"""Speech recognition by a mixture of experts on Whisper: clips, model, stages and figures.

May import the shared parts and the layers below them, and no other system. Read
``data/dataset.py`` first, then ``model/mixture.py``.
"""
