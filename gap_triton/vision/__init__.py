"""Pruning before the decoder: what a vision tower tells about the visual tokens, and where each of them stands."""
