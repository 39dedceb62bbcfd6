"""Loss terms of this system: count likelihood, Gaussian mixture, proportions.

May import `base` and the system's likelihood and normalisation, but no model. Read `count_nll.py`
first.
"""
