"""Operators for visual token pruning."""
