"""Moves a training run between frameworks: weights, optimizer state and progress."""
