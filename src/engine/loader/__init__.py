"""From a model name to files to parameters."""
