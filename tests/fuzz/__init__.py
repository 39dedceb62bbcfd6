"""Random and damaged inputs: every answer is correct work, or one line and a non-zero status.

``python -m fuzz`` (in `tests/`) tries them for a given time; `test_fuzz.py` does so briefly.
"""
