"""An app of Flower's without code of its own."""
