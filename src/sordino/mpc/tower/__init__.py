"""A text tower on shares: its weights, calibration, fixed-point plan, encoder and distillation."""
