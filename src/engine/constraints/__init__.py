"""Constrained decoding: from a schema, regex, choice or grammar to masks of tokens."""
