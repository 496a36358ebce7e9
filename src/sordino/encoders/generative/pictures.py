"""Pictures of each family of vision-language models: to pixels, to tokens of the language model, and to positions.

Every picture becomes the same number of tokens, whatever its shape, so that pictures form one table. LLaVA's
preprocessing cuts out a square. Idefics3's and SmolVLM's squeezes a picture into one; they can also split a picture
into tiles, which is switched off here. Qwen's models take any size; here pictures are squeezed into a square of
`image_size` pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sordino.encoders.pixels import bounded, rgb, shrunk
from sordino.errors import ConfigError

QWEN_SIZE = 224  # pixels of a side: 64 tokens at patches of 14 that are merged by twos


class Pictures:
    """LLaVA's pictures, and the common part.

    Args:
        model: the transformers model.
        processor: its image processor.
        size: as `encoder.generative.image_size`.
    """

    def __init__(self, model: Any, processor: Any, size: int | None) -> None:
        self.model, self.processor = model, processor
        self.size = self.side(size)

    def side(self, size: int | None) -> int | None:
        """Return the side of the square that pictures are scaled to; None if the checkpoint says it.

        Raises:
            ConfigError: the size is the checkpoint's to say, or does not fit it.
        """
        if size is not None:
            family = self.model.config.model_type
            raise ConfigError(
                "encoder.generative.image_size", size, f"the preprocessing of {family} says the size; leave it out"
            )
        return None

    def transform(self, image: Image.Image) -> Tensor:
        """Return pixels [3, H, W] of any picture."""
        size = getattr(self.processor, "size", None) or {}
        cut = bounded(image) if "shortest_edge" in size else shrunk(image, max(self._target(size), 1))
        return self._pixels(self.processor(images=rgb(cut), return_tensors="pt").pixel_values)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return the language model's tokens [B, T, E] of pixels [B, 3, H, W]."""
        return torch.stack(list(self.model.model.get_image_features(pixels).pooler_output))

    def positions(self, is_image: list[bool]) -> Tensor:
        """Return the rotary positions [1, S] of a dialog's tokens, or [3, 1, S]."""
        return torch.arange(len(is_image), device=self.model.device)[None]

    def _pixels(self, values: Tensor) -> Tensor:
        return values[0].float()

    @staticmethod
    def _target(size: Any) -> int:
        return max(int(size[key]) for key in ("height", "width", "longest_edge") if size.get(key)) if size else 1


class Idefics3Pictures(Pictures):
    """Pictures of Idefics3 and SmolVLM: one tile, the whole picture."""

    def transform(self, image: Image.Image) -> Tensor:
        target = int(self.processor.max_image_size["longest_edge"])
        values = self.processor(
            images=rgb(shrunk(image, target)), do_image_splitting=False, return_tensors="pt"
        ).pixel_values
        return self._pixels(values[0])

    def tokens(self, pixels: Tensor) -> Tensor:
        # The model's own `get_image_features` leaves out pictures that are zero everywhere, as padding.
        inner = self.model.model
        patch, (height, width) = self.model.config.vision_config.patch_size, pixels.shape[-2:]
        mask = torch.ones(len(pixels), height // patch, width // patch, dtype=torch.bool, device=pixels.device)
        hidden = inner.vision_model(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
        tokens: Tensor = inner.connector(hidden)
        return tokens


class QwenPictures(Pictures):
    """Pictures of Qwen2-VL and Qwen2.5-VL: patches of a square; positions have three parts."""

    def side(self, size: int | None) -> int:
        vision = self.model.config.vision_config
        step = int(vision.patch_size * vision.spatial_merge_size)
        if size is None:
            return max(1, round(QWEN_SIZE / step)) * step
        if size % step:
            near = max(1, round(size / step)) * step
            raise ConfigError("encoder.generative.image_size", size, f"a multiple of {step}, such as {near}")
        return size

    def transform(self, image: Image.Image) -> Tensor:
        assert self.size is not None
        square = rgb(shrunk(image, self.size)).resize((self.size, self.size), Image.Resampling.BICUBIC)
        values = self.processor(images=square, do_resize=False, return_tensors="pt").pixel_values
        return self.unpatched(values.float())

    def tokens(self, pixels: Tensor) -> Tensor:
        grid = torch.tensor([self.grid] * len(pixels), device=pixels.device)
        patches = self.patched(pixels).flatten(0, 1)
        return torch.stack(list(self.model.model.get_image_features(patches, grid).pooler_output))

    def positions(self, is_image: list[bool]) -> Tensor:
        kinds = torch.tensor([is_image], dtype=torch.int32, device=self.model.device)
        grid = torch.tensor([self.grid], device=kinds.device)
        positions: Tensor = self.model.model.get_rope_index(
            torch.zeros_like(kinds, dtype=torch.int64), mm_token_type_ids=kinds, image_grid_thw=grid
        )[0]
        return positions

    @property
    def grid(self) -> list[int]:
        """The number of patches in time, height and width."""
        assert self.size is not None
        side = self.size // self.model.config.vision_config.patch_size
        return [1, side, side]

    def patched(self, pixels: Tensor) -> Tensor:
        """Return the patches [B, n, 3 frames p p] of pixels [B, 3, H, W], as the processor orders them."""
        vision = self.model.config.vision_config
        merge, patch, frames = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        blocks = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        ordered = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, rows, columns, merge, merge, 3, p, p]
        patches: Tensor = ordered[:, :, :, :, :, :, None].expand(*[-1] * 6, frames, -1, -1)
        return patches.flatten(5).flatten(1, 4)

    def unpatched(self, patches: Tensor) -> Tensor:
        """Return the pixels [3, H, W] of one picture's patches [n, 3 frames p p]; inverse of `patched`."""
        assert self.size is not None
        vision = self.model.config.vision_config
        merge, patch, frames = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
        rows = self.grid[1] // merge
        blocks = patches.view(rows, rows, merge, merge, 3, frames, patch, patch)[..., 0, :, :]
        return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, self.size, self.size)
