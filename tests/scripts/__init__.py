"""What `make` runs beside the tests: other versions, long runs, and the table of what the kernels need."""
