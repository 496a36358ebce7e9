"""Fixtures of the runtimes' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from runtime.client_process import Spec
from runtime.federations import FEDERATIONS, SIX
from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_class
from sordino.encoders.prompt_model import PromptModel


@pytest.fixture
def spec_of(
    clip_folder: Path, model: PromptModel, table: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, read: Any
) -> Any:
    """Builds a federation's description."""

    def of(name: str) -> Spec:
        method, tables, privacy, runtime = FEDERATIONS[name]
        file = tmp_path / "table.safetensors"
        settings = settings_for(method, tables)
        features = read(model_class(algorithm(method)).of(settings, model.encoder, model.classes).reads)
        safetensors.torch.save_file({"features": features.contiguous(), "labels": table[1]}, file)
        return Spec(method, tables, SIX, 4, privacy, runtime, str(clip_folder), str(file), list(range(len(SIX))))

    return of
