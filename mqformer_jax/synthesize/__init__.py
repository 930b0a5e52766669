"""Masks and captions for sets that have boxes only (paper sec. 3.4): `mqformer synthesize
masks|captions`.
"""
