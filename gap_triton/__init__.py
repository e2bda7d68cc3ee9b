"""Visual token pruning that keeps position ids."""
