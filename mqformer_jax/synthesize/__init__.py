"""Generate masks and captions for data sets that have boxes only (paper sec. 3.4): `mqformer synthesize`."""
