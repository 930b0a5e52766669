"""The training loss: costs, matcher, criterion and denoising."""
