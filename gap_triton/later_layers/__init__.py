"""What the layers after a pruning layer are handed, and what they give back."""
