"""From predictions and a batch to a loss: costs, the matcher, the criterion."""
