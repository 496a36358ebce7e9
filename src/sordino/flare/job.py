"""A job of FLARE's for an experiment: configuration alone, and no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sordino.flare.names import CONTROLLER, EXECUTOR, POLL, TASK
from sordino.runtime.fleet import Patience
from sordino.sites.proposal import Proposal
from sordino.sites.submission import job_name


def write_job(folder: Path, proposal: Proposal, patience: Patience, least: int) -> Path:
    """Write a job's folder, and return it.

    Args:
        folder: it is made in there.
        proposal: the experiment.
        patience: how long the server waits, and for how many.
        least: sites without which it does not start.
    """
    meta = {
        "name": job_name(proposal),
        "resource_spec": {},
        "min_clients": least,
        "deploy_map": {"app": ["@ALL"]},
    }
    # As text: FLARE takes tables with certain keys, such as `name`, for components.
    coordinator = {
        "proposal": json.dumps(proposal.facts),
        "fingerprint": proposal.fingerprint,
        "patience": asdict(patience),
    }
    server = {
        "server": {"task_request_interval": POLL},
        "workflows": [{"id": "coordinator", "path": CONTROLLER, "args": coordinator}],
    }
    # Without arguments: nothing of a job chooses anything at a site.
    client = {"executors": [{"tasks": [TASK], "executor": {"path": EXECUTOR, "args": {}}}]}
    job = folder / job_name(proposal)
    config = job / "app" / "config"
    config.mkdir(parents=True)
    _write(job / "meta.json", meta)
    _write(config / "config_fed_server.json", _complete(server))
    _write(config / "config_fed_client.json", _complete(client))
    return job


def _complete(tables: Mapping[str, Any]) -> dict[str, Any]:
    filters: dict[str, list[Any]] = {"task_data_filters": [], "task_result_filters": []}
    return {"format_version": 2, **tables, "components": [], **filters}


def _write(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=1), encoding="utf-8")
