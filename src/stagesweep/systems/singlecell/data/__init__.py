"""Data of the system: files, quality control, splits and views of cells.

May import the shared data parts and `base`, and nothing else of the system. Read `dataset.py`
first; it uses `h5ad.py` (files), `genes.py` (filters) and `cells.py` (batches).
"""
