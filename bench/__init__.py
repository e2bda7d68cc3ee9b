"""Microbenchmarks of the operators, and the check of everything that needs a GPU. Not installed; see README.md."""
