"""The training core: the fit loop, loss, optimizer, early stopping, checkpoints and prediction.

Imports parallel, hardware and what lies below them; it knows no stage and no config file. Read
`fit.py` first.
"""
