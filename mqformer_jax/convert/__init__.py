"""Convert other projects' checkpoints to the format of this project, and back; see `mqformer convert --help`."""
