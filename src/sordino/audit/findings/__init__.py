"""The findings of an audit: in words, and how much they could have shown."""
