"""Loss and gradient of methods here beside those of their authors' public code, on the same tensors.

    python benchmarks/parity.py CLONES [METHOD ...]

CLONES is a folder of the repositories that `public_methods.METHODS` names, each under its own name. A method's public
code makes the loss of one batch of pictures and its gradient by all that it learns, from a small random CLIP, in
float64; so does Sordino from the same weights, pictures and parameters. `loss` and `gradient` are relative
differences: of the loss, and of the gradients of all parameters together. `set_aside` says what in the public code was
replaced because it is another thing there, so that the rest could be compared. Prints one JSON object, and fails if a
difference is above 1e-5.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import sys
from pathlib import Path

import torch
from public_code import Subject, as_here
from public_methods import METHODS, Step

TOLERANCE = 1e-5


def difference(found: Step, expected: Step) -> dict[str, float]:
    apart = {
        name: value - expected.gradient[name] for name, value in found.gradient.items() if name in expected.gradient
    }
    assert set(apart) == set(expected.gradient), (set(found.gradient), set(expected.gradient))
    norm = torch.cat([value.flatten() for value in expected.gradient.values()]).norm()
    return {
        "loss": float((found.loss - expected.loss).abs() / expected.loss.abs()),
        "gradient": float(torch.cat([value.flatten() for value in apart.values()]).norm() / norm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="a folder with the clones")
    parser.add_argument("methods", nargs="*", help="only these")
    arguments = parser.parse_args()
    subject, result = Subject.make(), {}
    for name in arguments.methods or METHODS:
        entry = METHODS[name]
        with as_here():
            expected, found = entry.steps(arguments.clones, subject)
        result[name] = {"code": f"{entry.repository} at {entry.commit}"} | difference(found, expected)
        result[name] |= {"set_aside": entry.set_aside} if entry.set_aside else {}
    print(json.dumps(result, indent=1))
    worst = {name: values for name, values in result.items() if max(values["loss"], values["gradient"]) > TOLERANCE}
    sys.exit(f"above {TOLERANCE}: {', '.join(worst)}" if worst else 0)


if __name__ == "__main__":
    main()
