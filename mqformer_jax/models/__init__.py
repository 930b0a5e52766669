"""The network, as the paper's figure has it. Knows nothing of data sets, tasks or optimizers."""
