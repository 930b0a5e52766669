"""The device mesh, parameter sharding and runs of several processes."""
