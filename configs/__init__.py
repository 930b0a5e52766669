"""Training recipes. They are installed as `mqformer_jax.configs`, so a wheel has them."""
