"""A hostile party: a process of FLARE's that sends others every message that FLARE has for them; see `sitecustomize`.

Where the folder SORDINO_TEST_HOSTILE gets a file `north.ask`, with the names of parties and of a file, the process of
north sends, and writes what each answered to `north.answers`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.cellnet import net_agent
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.private import defs
from nvflare.private.admin_defs import Message, MsgHeader
from nvflare.private.defs import RequestHeader

FOLDER = "SORDINO_TEST_HOSTILE"  # a variable of the environment
NET = "_net_manager"
SECONDS = 5.0
NO_JOB = "00000000-0000-4000-8000-000000000000"


def topics_of(*holders: type) -> list[str]:
    """The texts that FLARE's classes of names hold."""
    return [value for holder in holders for name, value in vars(holder).items() if name.isupper()]


REQUESTS = topics_of(defs.TrainingTopic, defs.SysCommandTopic, defs.InfoCollectorTopic, defs.ComponentCallerTopic)
DIAGNOSIS = [value for name, value in vars(net_agent).items() if name.startswith("_TOPIC_")]
OTHERS = [
    *((CellChannel.CLIENT_COMMAND, topic) for topic in ("abort", "show_errors", "configure_job_log", "shutdown")),
    *((CellChannel.AUX_COMMUNICATION, topic) for topic in ("fed.event", "__do_task__")),
    *((CellChannel.SERVER_COMMAND, topic) for topic in ("get_task", "submit_update", "configure_job_log")),
    (CellChannel.SERVER_PARENT_LISTENER, "update_run_status"),
    (CellChannel.CELLNET, "bulk"),
]


def requests(file: str) -> Iterator[tuple[str, bool, Message]]:
    """Every request to a site: each in FLARE's own topic and in `admin`, with and without a wish to be authorized."""
    for topic in REQUESTS:
        for authorized in (False, True):
            request = Message(topic, f"cat {file}")
            request.set_header(RequestHeader.JOB_ID, NO_JOB if authorized else "state")  # the folder beside a job's
            if authorized:
                request.set_header(RequestHeader.REQUIRE_AUTHZ, "true")
                request.set_header(RequestHeader.ADMIN_COMMAND, "check_status")
                request.set_header(RequestHeader.USER_NAME, "lead@example.org")
                request.set_header(RequestHeader.USER_ROLE, "project_admin")
            yield "admin", authorized, request
    yield "sys.shell", False, Message("sys.shell", f"cat {file}")


def ask_everything(cell: Any, target: str, file: str) -> list[dict[str, Any]]:
    """Send everything to a party, and return the answers as plain facts."""
    answers = []

    def ask(channel: str, topic: str, payload: Any, **more: Any) -> None:
        sent = new_cell_message({}, payload)
        reply = cell.core_cell.send_request(channel, topic, target, sent, timeout=SECONDS, optional=True)
        told = reply.payload
        refused = isinstance(told, Message) and told.get_header(MsgHeader.RETURN_CODE) == "_error"
        code = str(reply.get_header(MessageHeaderKey.RETURN_CODE))
        text = str(told.body) if isinstance(told, Message) else str(told)
        answers.append({"channel": channel, "topic": topic, "code": code, "refused": refused, "text": text, **more})

    for topic, authorized, request in requests(file):
        ask(CellChannel.CLIENT_MAIN, topic, request, request=request.topic, authorized=authorized)
    for topic in DIAGNOSIS:
        ask(NET, topic, {"mode": "", "pool": ""})
    for channel, topic in OTHERS:
        ask(channel, topic, [])
    return answers


def answer_to(folder: Path, name: str, cell: Any) -> None:
    """Send whenever a file says so."""
    while True:
        if (asked := folder / f"{name}.ask").exists():
            targets, file = json.loads(asked.read_text())
            asked.unlink()
            partial = folder / f"{name}.partial"
            partial.write_text(json.dumps({target: ask_everything(cell, target, file) for target in targets}))
            partial.rename(folder / f"{name}.answers")
        time.sleep(0.2)


def install(party: type) -> None:
    """Make FLARE's administration of a site or a server hostile, once it has a cell."""
    make = party.__init__  # type: ignore[misc]

    def made(self: Any, *args: Any, **more: Any) -> None:
        make(self, *args, **more)
        folder, name = Path(os.environ[FOLDER]), self.cell.core_cell.my_info.fqcn
        threading.Thread(target=answer_to, args=[folder, name, self.cell], daemon=True).start()

    party.__init__ = made  # type: ignore[misc]
