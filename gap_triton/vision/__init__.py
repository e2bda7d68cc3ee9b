"""Pruning before the decoder: where each visual token stands in its image, and which of them survive."""
