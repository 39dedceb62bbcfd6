"""Data of the system: tables of clips, audio, features, tokens and splits.

May import the shared data parts and layers below, and nothing else of the system. Read `dataset.py`
first; it uses `audio.py` (files), `features.py` (log-mel cache), `tokens.py` and `windows.py`
(batches).
"""
