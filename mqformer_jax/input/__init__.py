"""The input pipeline: read prepared shards and make batches of NumPy arrays. It uses no JAX device."""
