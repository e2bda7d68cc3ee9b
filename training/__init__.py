"""Training of the embedded models, from nothing, on a CPU: ``python -m training.train --help``."""
