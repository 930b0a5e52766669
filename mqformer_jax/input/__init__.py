"""From prepared shards to batches. Knows no JAX device."""
