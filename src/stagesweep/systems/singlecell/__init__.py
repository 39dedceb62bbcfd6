"""Single cells: types of cells from gene counts, and patients from their cells.

Contains data, simulator, models, losses, stages, metric and figures of this system. May import the
shared parts and everything below, but no other system. Read `data/dataset.py` first, then
`model/gmvae.py`.
"""
