"""Distributed algorithms on emulated devices: numpy blocks, counted traffic. They check the formulas beside them."""
