"""MQ-Former in JAX: one text-prompted model for every segmentation task."""

__version__ = "0.1.0"
