"""Oracles of the operators and the strategies: plain loops over samples, heads, rows and keys."""
