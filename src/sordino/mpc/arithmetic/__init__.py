"""Integers modulo powers of two: the ring, kernels, packing, products, pseudo-random streams."""
