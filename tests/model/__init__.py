"""Proof by exhaustive search that only one side speaks; see doc/source/contributor/model.rst."""
