"""What a pruned KV cache stands for."""
