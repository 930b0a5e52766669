"""Convert other projects' checkpoints to this project's format, and back (`mqformer convert --help`)."""
