"""Attacks through a service: by whoever may ask a served prompt, and sees its answers alone.

`copying` makes a copy of the prompt from answers; `label_only` guesses from them who was trained on. Both ask as a
client of the API does, in pictures, and are told what it tells: the most probable classes with rounded probabilities.
"""
