"""Check that results are still the same bits.

Run every text-side method under every mechanism for five rounds of `examples/digits.toml`, with simulated noise, and
compare digests of what came out with those kept in `same_bits.json`:

    python tests/same_bits.py             # compare; exit code 1 where something differs
    python tests/same_bits.py --write     # keep the digests of now

A digest covers the summary's scores and privacy, the losses of all rounds, and every tensor of prompts and
checkpoint. It leaves out seconds and random names, which differ between two equal runs, and bytes on the wire, which
say how a message is packed. Simulated noise is keyed by the text of settings. So the names that settings had when the
digests were made are put back where that key is made (`RENAMED`), and settings that came later are left out (`ADDED`).
Processors round differently: digests belong to one kind of processor and one release of torch, and on others the script
says so and compares nothing.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

RUN = "--run"  # followed by arguments of `sordino`
ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("same_bits.json")
NONCE = "00112233445566778899aabbccddeeff"
METHODS = (
    *("zero-shot", "local", "central", "promptfl", "fedprompt", "fedotp"),
    *("fedpgp", "pfedprompt", "dp-fpl", "secfpp", "secfpp-plain"),
)
MECHANISMS = {
    "none": [],
    "dp-sgd": ["privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.0"],
    "cotangent": ["privacy.mechanism=cotangent", "privacy.noise_multiplier=1.0"],
    "dp-fedavg": ["privacy.mechanism=dp-fedavg", "privacy.noise_multiplier=1.0", "privacy.clip_quantile=0.5"],
}
ADDED = re.compile(  # settings that came later
    r", unit='\w+', person_images=\d+|, count_share=None, center_share=None, scatter_share=None, sampling_rate=1.0"
    r", held_error=0.5, release=None|, directions='names'|, max_norm=inf|, compress=False"
)
RENAMED = {
    "parameterization=": "parameterisation=",
    "regularization=": "regularisation=",
    "subspace=None": "subspace=16",
}  # settings: now, and then
SIMULATED = ["privacy.simulation=true", f"privacy.nonce={NONCE}", "runtime.weighting=uniform"]


def processor() -> str:
    """Return a name of what decides how sums are rounded."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    told = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    kind = "/".join(told.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping"))
    return f"{platform.machine()} {kind} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def digests_of(out: Path) -> dict[str, str]:
    """Return the digests of a run directory, by part."""
    summary = json.loads((out / "summary.json").read_bytes())
    privacy = {key: value for key, value in summary["privacy"].items() if key != "ledger_digest"}
    if privacy["epsilon"] is not None and privacy["delta"] is not None:  # which a statement rounds up by now
        told = f"epsilon = {privacy['epsilon']:.4g} at delta = {privacy['delta']:.2g}"
        privacy["statement"] = re.sub(r"epsilon = \S+ at delta = \S+", told, privacy["statement"])
    kept = {key: summary[key] for key in ("algorithm", "clients", "rounds", "accuracy", "per_client")}
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    prompts = _tensors(out / "prompts")
    return {
        "summary": _digest(json.dumps(kept | {"privacy": privacy}, sort_keys=True)),
        "losses": _digest(json.dumps(losses)),
        "prompts": _digest(prompts),
        "checkpoint": _digest(_tensors(out / "checkpoint")),
    }


def _tensors(folder: Path) -> str:
    """Return the tensors of the newest files in a folder as text; a later round's replace an earlier one's."""
    lines: dict[str, str] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        content = file.read_bytes()
        for name, tensor in sorted((safetensors.torch.load(content) if content else {}).items()):
            owner = file.stem if folder.name == "prompts" else ""
            numbers = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            lines[f"{owner} {name}"] = f"{tensor.dtype} {list(tensor.shape)} {numbers}"
    return "\n".join(f"{name}: {line}" for name, line in sorted(lines.items()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Before:
    """Settings in the text that they had when the digests were made."""

    def __init__(self, settings: Any) -> None:
        self._text = repr(settings)
        self._settings = settings
        for now, then in RENAMED.items():
            self._text = self._text.replace(now, then)
        self._text = ADDED.sub("", self._text)

    def __repr__(self) -> str:
        return self._text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._settings, name)

    def model_copy(self, **changed: Any) -> _Before:
        return _Before(self._settings.model_copy(**changed))


def run_as_before(arguments: list[str]) -> None:
    """Be the command `sordino`, with simulated noise keyed by settings in their old text."""
    from sordino.__main__ import main as sordino
    from sordino.runtime.local import LocalRuntime

    identity = vars(LocalRuntime)["identity"].func

    def keyed(runtime: LocalRuntime) -> str:
        renamed = copy.copy(runtime)
        renamed.settings = _Before(runtime.settings)
        renamed.privacy = _Before(runtime.privacy)  # type: ignore[assignment]
        return str(identity(renamed))

    LocalRuntime.identity = property(keyed)  # type: ignore[assignment, method-assign]
    sys.argv = ["sordino", *arguments]
    sordino()


def measured(method: str, mechanism: str, folder: Path) -> dict[str, str]:
    """Run one combination; return its digests, or why it is refused."""
    words = [f"algorithm={method}", "rounds=5", "runtime.evaluate_every=5", *MECHANISMS[mechanism]]
    words += SIMULATED if mechanism != "none" else []
    out = folder / method / mechanism
    command = [sys.executable, __file__, RUN, "run", str(ROOT / "examples" / "digits.toml"), "--out", str(out)]
    for word in words:
        command += ["--set", word]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode == 2:
        return {"refused": re.sub(r"\s+", " ", done.stderr.splitlines()[-1])[:60]}
    if done.returncode:
        raise SystemExit(f"{method} under {mechanism} ends with {done.returncode}: {done.stderr[-2000:]}")
    return digests_of(out)


def main() -> int:
    """Compare, or write; return the exit code."""
    if sys.argv[1:2] == [RUN]:
        run_as_before(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the digests of now")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    chosen = parser.parse_args()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if not chosen.write and processor() not in kept:
        print(f"no digests are kept for this processor: {processor()}")
        return 0
    found: dict[str, dict[str, str]] = {}
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        for method in chosen.methods:
            for mechanism in MECHANISMS:
                name = f"{method} {mechanism}"
                found[name] = measured(method, mechanism, Path(folder))
                before = found[name] if chosen.write else kept[processor()][name]
                parts = [part for part in found[name] | before if found[name].get(part) != before.get(part)]
                differing += bool(parts)
                print(f"{name}: {'differs in ' + ', '.join(parts) if parts else 'the same'}", flush=True)
    if chosen.write:
        kept[processor()] = kept.get(processor(), {}) | found  # the digests of other methods stay
        KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
