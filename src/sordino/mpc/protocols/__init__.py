"""Protocols of two parties on shares: linear maps, Fourier series, roots, attention."""
