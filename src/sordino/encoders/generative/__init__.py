"""Vision-language models that generate text: soft prompts among their tokens, class names as answers."""
