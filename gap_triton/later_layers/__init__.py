"""The inputs of the layers after a pruning layer, and their outputs."""
