"""The input pipeline: from prepared shards to batches of NumPy arrays. It uses no JAX device."""
