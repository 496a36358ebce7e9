"""The capabilities of encoders beyond text prompts, and which encoder has which."""

from __future__ import annotations

from enum import StrEnum


class Capability(StrEnum):
    """A capability that a method may need of an encoder, beyond text prompts."""

    PATCHES = "patches"  # patch_features
    PIXEL_GRADIENTS = "pixel-gradients"  # image_features is differentiable in its pixels
    # image_tower: a transformer that takes prompt tokens and adapters
    VISUAL_PROMPTS = "visual-prompts"
    # image_state and likelihoods, in place of features: class names are answers to a question on an image
    LIKELIHOODS = "likelihoods"
    DEEP_TEXT_PROMPTS = "deep-text-prompts"  # deep_text_features: other context vectors in later layers


# By encoder name; each encoder class takes its own from here, so that errors can name the others
# without loading them.
CAPABILITIES = {
    "bundled": frozenset({Capability.PATCHES, Capability.PIXEL_GRADIENTS}),
    "clip": frozenset(
        {
            Capability.PATCHES,
            Capability.PIXEL_GRADIENTS,
            Capability.VISUAL_PROMPTS,
            Capability.DEEP_TEXT_PROMPTS,
        }
    ),
    "generative": frozenset({Capability.LIKELIHOODS}),
}


def with_features() -> list[str]:
    """Return the names of the encoders with features of images and class names in one space."""
    return [name for name, capabilities in CAPABILITIES.items() if Capability.LIKELIHOODS not in capabilities]


def with_capability(capability: Capability) -> list[str]:
    """Return the names of the encoders that have a capability."""
    return [name for name, capabilities in CAPABILITIES.items() if capability in capabilities]
