"""Integers modulo powers of two: ring, kernels, packing, products, pseudo-random streams."""
