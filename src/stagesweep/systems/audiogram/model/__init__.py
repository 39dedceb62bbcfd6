"""The variational autoencoder of audiograms and digits: encoder, decoder, cluster assignment.

May import the shared parts and the layers below them. Read ``vae.py`` first.
"""
