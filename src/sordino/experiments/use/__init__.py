"""The use of saved prompts: on pictures, for free answers, and on other data sets."""
