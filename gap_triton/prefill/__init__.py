"""One pass over a prompt: what is scored, chosen and dropped."""
