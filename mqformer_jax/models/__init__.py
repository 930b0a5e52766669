"""The MQ-Former network. This code does not depend on data sets, tasks or optimizers."""
