"""The network of the paper's figure. It does not depend on data sets, tasks or optimizers."""
