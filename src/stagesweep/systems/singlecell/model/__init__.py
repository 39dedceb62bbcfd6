"""Models of this system: GMVAE of cells and GMVAE4P of patients.

May import shared models, `base` and the system's likelihood and normalisation, but no loss. Read
`gmvae.py` first.
"""
