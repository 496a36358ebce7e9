"""The server's end inside FLARE: a controller that coordinates one experiment over the job's sites."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable

from sordino.errors import RunError, SordinoError
from sordino.experiments.run_lock import FILE as LOCK
from sordino.experiments.run_lock import wait_until_free
from sordino.files import make_private
from sordino.flare.fleet import Aborted, FlareFleet, Paused, Told
from sordino.flare.gate import OLD_KIT, is_shut
from sordino.flare.names import CONTENT, PAUSE, PROGRESS, RESULTS, TASK
from sordino.runtime.fleet import Patience
from sordino.sites.coordinator import coordinate
from sordino.sites.proposal import Proposal
from sordino.sites.server_settings import COORDINATOR_FILE, CoordinatorSettings, load_coordinator
from sordino.sites.submission import FAILED, PAUSED

LOCK_SECONDS = 120.0  # an earlier job's process may outlive the server that started it for a while


class Coordinator(Controller):  # type: ignore[misc]
    """Runs an experiment, and writes its run directory at the server; a new job of it goes on from there.

    Where that is, and where encoders are, the server's own file says; see `server_settings`.

    Args:
        proposal: the experiment, `Proposal.facts` as JSON.
        fingerprint: of it; FLARE replaces some expressions in the text of a job.
        patience: the fields of `Patience`.
    """

    def __init__(self, proposal: str, fingerprint: str, patience: Mapping[str, Any]) -> None:
        super().__init__(task_check_period=0.05)
        self._proposal, self._fingerprint, self._patience = proposal, fingerprint, Patience(**patience)
        self._lines: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._pause = threading.Event()

    def start_controller(self, fl_ctx: Any) -> None:
        """Make the progress known to administrators who ask, and let them end the job between two rounds."""
        fl_ctx.get_engine().register_app_command(PROGRESS, self._progress)
        fl_ctx.get_engine().register_app_command(PAUSE, self._paused)

    def stop_controller(self, fl_ctx: Any) -> None:
        """Nothing is left to stop."""

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any
    ) -> None:
        """Say that an answer came too late. It was charged at its site, and is not used."""
        self.log_info(fl_ctx, f"an answer of {client.name} came too late", fire_event=False)

    def control_flow(self, abort_signal: Any, fl_ctx: Any) -> None:
        """Run the experiment to its end; a failure of the experiment ends the job, with the reason in its results."""
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        results = Path(workspace.get_run_dir(fl_ctx.get_job_id())) / RESULTS
        make_private(results)
        try:
            if not is_shut():
                raise RunError(f"the server {OLD_KIT}")
            settings = load_coordinator(Path(workspace.get_site_config_dir()) / COORDINATOR_FILE)
            proposal = read_proposal(self._proposal, self._fingerprint)
            out = settings.folder(proposal)
            self._run(settings, proposal, out, FlareFleet(FlareTasks(self, fl_ctx, abort_signal, self._pause)))
            shutil.copytree(out, results, ignore=shutil.ignore_patterns(LOCK), dirs_exist_ok=True)
        except Aborted:
            self.log_warning(fl_ctx, "the job was aborted; a new one goes on from the last round", fire_event=False)
        except Paused as error:
            self.log_info(fl_ctx, f"{error}; a new one goes on from there", fire_event=False)
            (results / PAUSED).write_text(f"{error}\n", encoding="utf-8")
        except SordinoError as error:
            (results / FAILED).write_text(f"{error}\n", encoding="utf-8")
            self.system_panic(str(error), fl_ctx)

    def _run(self, settings: CoordinatorSettings, proposal: Proposal, out: Path, fleet: FlareFleet) -> None:
        wait_until_free(out, LOCK_SECONDS)
        coordinate(settings.config(proposal), proposal, fleet, out, self._patience, self._heard)

    def _heard(self, line: dict[str, Any]) -> None:
        with self._lock:
            self._lines.append(line)

    def _progress(self, topic: str, data: Any, fl_ctx: Any) -> dict[str, Any]:
        """Return the lines of this job's rounds, from a number on."""
        start = data.get("start", 0) if isinstance(data, dict) else 0
        with self._lock:
            return {"lines": self._lines[max(int(start), 0) :]}

    def _paused(self, topic: str, data: Any, fl_ctx: Any) -> dict[str, Any]:
        """Have the job end before its next round."""
        self._pause.set()
        return {}


class FlareTasks:
    """A controller's tasks, as a fleet needs them.

    Args:
        controller: the controller.
        fl_ctx: its context.
        abort_signal: FLARE's, for the job.
        pause: is set where the job is to end between two rounds.
    """

    def __init__(self, controller: Any, fl_ctx: Any, abort_signal: Any, pause: threading.Event) -> None:
        self._controller, self._fl_ctx, self._abort, self._pause = controller, fl_ctx, abort_signal, pause

    def sites(self) -> frozenset[str]:
        return frozenset(client.name for client in self._fl_ctx.get_engine().get_clients())

    def start(self, site: str, content: bytes, told: Told) -> Callable[[], None]:
        data = Shareable()
        data[CONTENT] = content

        def result_received(client_task: Any, fl_ctx: Any) -> None:
            told(content_of(client_task.result))
            client_task.result = None  # it is kept by FLARE otherwise

        def task_done(task: Any, fl_ctx: Any) -> None:
            # After an answer this is the second word on the task, which nobody hears.
            told(f"FLARE ended its task: {getattr(task.completion_status, 'value', 'for no reason that it tells')}")

        task = Task(TASK, data, result_received_cb=result_received, task_done_cb=task_done)
        self._controller.broadcast(task, self._fl_ctx, targets=[site], min_responses=1)
        return lambda: self._controller.cancel_task(task)

    def aborted(self) -> bool:
        return bool(self._abort.triggered)

    def paused(self) -> bool:
        return self._pause.is_set()


def read_proposal(text: str, fingerprint: str) -> Proposal:
    """Read the proposal of a job.

    Raises:
        RunError: it is malformed, or another one than was submitted.
    """
    try:
        proposal = Proposal.read(json.loads(text))
    except (ValueError, AttributeError) as error:
        raise RunError(f"the job's proposal cannot be read ({error}); submit it with 'sordino flare run'") from None
    if proposal.fingerprint != fingerprint:
        raise RunError(
            f"the job holds experiment {proposal.fingerprint[:12]} and names {fingerprint[:12]}; an expression such as "
            "${...} in a class's name is replaced by FLARE, so choose another name"
        )
    return proposal


def content_of(result: Any) -> bytes | str:
    """Return a result's bytes, or why it has none."""
    code = result.get_return_code()
    if code != ReturnCode.OK:
        return f"it failed: {code}"
    content = result.get(CONTENT)
    return bytes(content) if isinstance(content, bytes | bytearray | memoryview) else "its answer holds no bytes"
