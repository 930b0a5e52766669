"""The device mesh, parameter sharding, and training runs with several processes."""
