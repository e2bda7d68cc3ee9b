"""Accuracy of a model on a user's own data, pruned and not: readers, answer formats, resumable answers, the comparison."""
