"""Convert checkpoints of other projects to ours, and back; see `mqformer convert --help`."""
