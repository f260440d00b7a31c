"""Turns a `ScheduledBatch` into tensors, runs the model and samples."""
