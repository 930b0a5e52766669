"""Checkpoints of other projects into ours, and back:  python -m mqformer_jax.convert --help"""
