"""One evaluator a task, each a thin state around a well-kept metric library."""
