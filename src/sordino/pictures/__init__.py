"""Pictures of any format, mode and depth, read as 8-bit ones of the right brightness."""
