"""A model switched on and off, and what runs around each of its modules: start reading in hooks.py."""
