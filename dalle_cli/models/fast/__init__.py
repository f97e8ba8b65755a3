"""Fast CPU and GPU forms of the operations in `kernels.py`, which alone chooses among them."""
