"""Masks and captions for sets that have boxes only (paper sec. 3.4): `python -m mqformer_jax.synthesize
masks|captions`.
"""
