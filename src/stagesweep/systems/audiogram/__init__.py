"""Clustering of mouse audiograms, and of handwritten digits as its public stand-in.

Belongs here: whatever knows animals, genes, litters or frequencies, and the variational autoencoder
for both data sets. May import the shared parts and the layers below them, and no other system. Read
``data.py`` first, then ``model/vae.py``; the stages are those of ``stagesweep.stage.clustering``.
"""
