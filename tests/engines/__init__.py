"""What all engines are tested with; a package, as `benchmarks/engines.py` would have its name otherwise."""
