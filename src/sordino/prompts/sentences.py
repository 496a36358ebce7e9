"""Beginnings of sentences about a picture, which a class name ends.

They are those of the prompts that CLIP's authors chose for ImageNet (Radford et al., Learning Transferable Visual
Models From Natural Language Supervision, 2021) in which nothing but a full stop follows the name, in their order.
"""

SENTENCES = (
    *("a bad photo of a", "a photo of many", "a sculpture of a", "a photo of the hard to see"),
    *("a low resolution photo of the", "a rendering of a", "graffiti of a", "a bad photo of the"),
    *("a cropped photo of the", "a tattoo of a", "the embroidered", "a photo of a hard to see"),
    *("a bright photo of a", "a photo of a clean", "a photo of a dirty", "a dark photo of the"),
    *("a drawing of a", "a photo of my", "the plastic", "a photo of the cool", "a close-up photo of a"),
    *("a black and white photo of the", "a painting of the", "a painting of a", "a pixelated photo of the"),
    *("a sculpture of the", "a bright photo of the", "a cropped photo of a", "a plastic"),
    *("a photo of the dirty", "a jpeg corrupted photo of a", "a blurry photo of the", "a photo of the"),
    *("a good photo of the", "a rendering of the", "a photo of one", "a doodle of a"),
    *("a close-up photo of the", "a photo of a", "the origami", "a sketch of a", "a doodle of the"),
    *("a origami", "a low resolution photo of a", "the toy", "a rendition of the", "a photo of the clean"),
    *("a photo of a large", "a rendition of a", "a photo of a nice", "a photo of a weird"),
    *("a blurry photo of a", "a cartoon", "art of a", "a sketch of the", "a embroidered"),
    *("a pixelated photo of a", "itap of the", "a jpeg corrupted photo of the", "a good photo of a"),
)
