"""The gate of FLARE's processes: they hear what a job needs, from where it may come, and nothing else.

FLARE checks a site's `authorization.json` only if a request asks for that, and passes on whatever its parties send each
other. Its sites answer a shell, its network's diagnosis, and commands that restart, reconfigure and delete. A site's
own `local/resources.json` names `Gate`, which FLARE makes before it connects: in its own process and in every job's.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import nvflare
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import AdminCommandNames, ReservedTopic, ServerCommandNames
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, MessageHeaderKey, MessagePropKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.streaming.download_service import OBJ_DOWNLOADER_CHANNEL, OBJ_DOWNLOADER_TOPIC
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_ACK_TOPIC,
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    STREAM_ERROR_TOPIC,
    StreamHeaderKey,
)
from nvflare.fuel.sec.authz import AuthorizationService, AuthzContext, Person
from nvflare.fuel.utils.admin_name_utils import is_valid_admin_client_name
from nvflare.fuel.utils.log_utils import get_module_logger
from nvflare.private.admin_defs import error_reply
from nvflare.private.defs import RequestHeader, TrainingTopic
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.client.admin_commands import AdminCommands
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.stream_runner import TOPIC_STREAM_ABORT, TOPIC_STREAM_REQUEST

from sordino.errors import RunError

OLD_KIT = "has a kit of an earlier version, which leaves FLARE open; make all kits anew, with new keys"
KNOWN = "2.9."  # versions of FLARE whose inner parts are those that this module closes

# Where a message comes from: the server and its jobs, this site's own processes, another site, an administrator.
SERVER, OWN, SITE, ADMINISTRATOR = "server", "own", "site", "administrator"
Rules = Mapping[tuple[str, str | None], frozenset[str]]  # by channel and topic; None is all topics of a channel


def _from(*origins: str) -> frozenset[str]:
    return frozenset(origins)


# What a site and its jobs hear, and an administrator's command. `admin` is the topic of all requests to a site; what is
# in them is in REQUESTS.
AT_SITES: Rules = {
    (CellChannel.CLIENT_MAIN, "admin"): _from(SERVER),
    (CellChannel.CLIENT_MAIN, TrainingTopic.NOTIFY_JOB_STATUS): _from(OWN),
    (CellChannel.CLIENT_COMMAND, AdminCommandNames.ABORT): _from(OWN),
    (CellChannel.AUX_COMMUNICATION, ReservedTopic.END_RUN): _from(SERVER),
    (CellChannel.HCI, "SESSION_EXPIRED"): _from(SERVER),
    (CellChannel.CELLNET, CellChannelTopic.Bye): _from(SERVER, OWN),
    (CellChannel.RETURN_ONLY, None): _from(SERVER, OWN),
    (STREAM_CHANNEL, STREAM_ACK_TOPIC): _from(SERVER, OWN),
    (STREAM_CHANNEL, STREAM_ERROR_TOPIC): _from(SERVER, OWN),
}
# And what the server and its jobs hear from others. Among themselves they may say everything.
AT_THE_SERVER: Rules = {
    (CellChannel.SERVER_MAIN, CellChannelTopic.Challenge): _from(SITE, ADMINISTRATOR),
    (CellChannel.SERVER_MAIN, CellChannelTopic.Register): _from(SITE, ADMINISTRATOR),
    (CellChannel.SERVER_MAIN, CellChannelTopic.Quit): _from(SITE),
    (CellChannel.SERVER_MAIN, CellChannelTopic.HEART_BEAT): _from(SITE),
    (CellChannel.SERVER_MAIN, CellChannelTopic.REPORT_JOB_FAILURE): _from(SITE),
    (CellChannel.SERVER_COMMAND, ServerCommandNames.GET_TASK): _from(SITE),
    (CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE): _from(SITE),
    (CellChannel.AUX_COMMUNICATION, ReservedTopic.SYNC_RUNNER): _from(SITE),
    (CellChannel.AUX_COMMUNICATION, ReservedTopic.JOB_HEART_BEAT): _from(SITE),
    (CellChannel.AUX_COMMUNICATION, ReservedTopic.TASK_CHECK): _from(SITE),
    (CellChannel.AUX_COMMUNICATION, TOPIC_STREAM_REQUEST): _from(ADMINISTRATOR),
    (CellChannel.AUX_COMMUNICATION, TOPIC_STREAM_ABORT): _from(ADMINISTRATOR),
    (OBJ_DOWNLOADER_CHANNEL, OBJ_DOWNLOADER_TOPIC): _from(ADMINISTRATOR),  # by an id of what the server offers
    (CellChannel.HCI, None): _from(ADMINISTRATOR),
    (CellChannel.CELLNET, CellChannelTopic.Bye): _from(SITE, ADMINISTRATOR),
    (CellChannel.RETURN_ONLY, None): _from(SITE, ADMINISTRATOR),
    (STREAM_CHANNEL, STREAM_ACK_TOPIC): _from(SITE, ADMINISTRATOR),
    (STREAM_CHANNEL, STREAM_ERROR_TOPIC): _from(SITE, ADMINISTRATOR),
}

# The requests that a site answers, and the right that it asks of the person whom a request names. The others name
# nobody; they start, end and clear away what was deployed with such a right.
REQUESTS: Mapping[str, str | None] = {
    TrainingTopic.CHECK_RESOURCE: AdminCommandNames.SUBMIT_JOB,
    TrainingTopic.DEPLOY: AdminCommandNames.SUBMIT_JOB,
    TrainingTopic.CHECK_STATUS: AdminCommandNames.CHECK_STATUS,
    TrainingTopic.START_JOB: None,
    TrainingTopic.CANCEL_RESOURCE: None,
    TrainingTopic.ABORT: None,
    TrainingTopic.DELETE_RUN: None,
    TrainingTopic.NOTIFY_JOB_STATUS: None,
}
WITHOUT_A_JOB = frozenset({TrainingTopic.CHECK_STATUS, TrainingTopic.CANCEL_RESOURCE})
# FLARE's own ids. A job's folder is named after it, beside a site's `local`, `startup` and `state`.
JOB_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Gate(FLComponent):  # type: ignore[misc]
    """Shuts what is not needed, in the process that makes it.

    Raises:
        RunError: FLARE's inner parts are not as expected.
    """

    def __init__(self) -> None:
        super().__init__()
        shut()

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """End the process once FLARE is ready, if anything is open still: FLARE goes on after exceptions of events."""
        if event_type != EventType.SYSTEM_START:
            return
        try:
            left = left_open(fl_ctx.get_engine())
        except Exception as error:
            left = f"{type(error).__name__}: {error}"
        if left:
            print(f"error: FLARE {nvflare.__version__} is not shut: {left}", file=sys.stderr, flush=True)
            os._exit(1)


class Checked(RequestProcessor):  # type: ignore[misc]
    """One of a site's processors, behind the checks of every request.

    Args:
        processor: FLARE's.
        topics: those of its topics that are needed.
    """

    def __init__(self, processor: Any, topics: list[str]) -> None:
        self.processor, self.topics = processor, topics

    def get_topics(self) -> list[str]:
        return self.topics

    def process(self, req: Any, app_ctx: Any) -> Any:
        reason = refusal(req)
        return error_reply(reason) if reason else self.processor.process(req, app_ctx)


def refusal(request: Any) -> str:
    """Return why a site refuses a request, or nothing. Whether the request asks for authorization does not matter."""
    if request.topic not in REQUESTS:
        return "this site does not answer that"
    job = request.get_header(RequestHeader.JOB_ID)
    if not (job is None and request.topic in WITHOUT_A_JOB) and not _is_job(job):
        return "job_id is none of FLARE's"
    meta = request.get_header(RequestHeader.JOB_META)
    if isinstance(meta, dict) and meta.get("job_id", job) != job:
        return "job_id is another one in the job's own description"
    right = REQUESTS[request.topic]
    if right is None:
        return ""
    person, submitter = (
        Person(*(request.get_header(header, "") for header in headers))
        for headers in (
            (RequestHeader.USER_NAME, RequestHeader.USER_ORG, RequestHeader.USER_ROLE),
            (RequestHeader.SUBMITTER_NAME, RequestHeader.SUBMITTER_ORG, RequestHeader.SUBMITTER_ROLE),
        )
    )
    if AuthorizationService.get_authorizer() is None:
        return "this site has no authorization.json"
    allowed, error = AuthorizationService.authorize(AuthzContext(user=person, submitter=submitter, right=right))
    return "" if allowed and not error else str(error or f"not authorized: {right}")


def hears(message: Any, own: Any) -> str:
    """Return why a cell neither takes nor passes on a message, or nothing.

    Args:
        message: FLARE's, as it came.
        own: the cell's `my_info`.
    """
    origin, target = (_root(message.get_header(key)) for key in (MessageHeaderKey.ORIGIN, MessageHeaderKey.DESTINATION))
    endpoint = message.get_prop(MessagePropKey.ENDPOINT)
    # The name of the one that is connected, which its certificate vouches for; the message may say another origin.
    neighbour = _root(endpoint.name if endpoint else "")
    if own.is_on_server:
        if neighbour not in (origin, SERVER):
            return f"it comes from {neighbour!r}"
        if SERVER not in (neighbour, target):
            return "parties of the project say nothing to each other"
        if origin == SERVER:
            return ""
        source, rules = ADMINISTRATOR if is_valid_admin_client_name(origin) else SITE, AT_THE_SERVER
    else:
        if origin not in (own.root, SERVER) or neighbour not in (own.root, SERVER):
            return "it is neither from the server nor from this site"
        if neighbour == SERVER and origin != SERVER:
            return "the server sent it in another's name"
        source, rules = OWN if origin == own.root else SERVER, AT_SITES
    if message.get_header(MessageHeaderKey.DESTINATION) != own.fqcn:
        return ""  # the process that it is for judges
    channel, topic = _subject(message)
    allowed = rules.get((channel, topic)) or rules.get((channel, None)) or frozenset()
    return "" if source in allowed else "nothing needs it"


def shut() -> None:
    """Shut this process, before FLARE's cells are made.

    Raises:
        RunError: FLARE's inner parts are not as expected.
    """
    if not str(nvflare.__version__).startswith(KNOWN):
        raise RunError(f"nvflare = {nvflare.__version__}: only {KNOWN}* can be shut; install Sordino's extra 'flare'")
    processors, commands = ClientRequestProcessors.request_processors, AdminCommands.commands
    if not isinstance(processors, list) or not isinstance(commands, list):
        raise RunError(f"nvflare = {nvflare.__version__}: its requests and commands are not as expected")
    processors[:] = [checked for each in processors if (checked := _checked(each)).topics]
    if {topic for each in processors for topic in each.get_topics()} != set(REQUESTS):
        raise RunError(f"nvflare = {nvflare.__version__}: requests that a job needs are missing")
    commands[:] = [each for each in commands if each.get_command_name() == AdminCommandNames.ABORT]
    if not commands or (CoreCell.ALL_CELLS and not is_shut()):
        raise RunError(f"nvflare = {nvflare.__version__}: it has other commands, or listens too early")
    if not is_shut():
        CoreCell.__init__ = _guarded(CoreCell.__init__)


def left_open(engine: Any) -> str:
    """Return what is open still, when FLARE is ready."""
    cells = [engine.get_cell().core_cell, *CoreCell.ALL_CELLS.values()]
    if not all(cell.message_interceptor is intercept for cell in cells):
        return "a cell hears everything"
    if any(cell.my_info.is_on_server for cell in cells):
        return ""
    processors = engine.admin_agent.processors
    other = [topic for topic, each in processors.items() if not isinstance(each, Checked) or topic not in REQUESTS]
    return f"it answers {', '.join(other)}" if other else ""


def is_shut() -> bool:
    """Tell whether this process is."""
    return hasattr(CoreCell.__init__, "_sordino")


def _checked(processor: Any) -> Checked:
    if isinstance(processor, Checked):
        return processor
    return Checked(processor, [topic for topic in processor.get_topics() if topic in REQUESTS])


def _guarded(make: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(make)
    def make_guarded(self: Any, *args: Any, **more: Any) -> None:
        make(self, *args, **more)
        self.set_message_interceptor(intercept, self.my_info)

    make_guarded._sordino = True  # type: ignore[attr-defined]
    return make_guarded


def intercept(message: Any, own: Any) -> Any:
    """Return what FLARE answers a request that is not heard, or None. It asks before it decodes or passes on."""
    if not (reason := hears(message, own)):
        return None
    told = (*_subject(message), message.get_header(MessageHeaderKey.ORIGIN))
    what = ", ".join(repr(str(each))[:80] for each in told)
    get_module_logger(__name__, "gate").warning(f"refused {what}: {reason}")
    return make_reply(ReturnCode.INVALID_REQUEST, error=reason)


def _root(name: Any) -> str:
    return str(name or "").partition(".")[0]


def _subject(message: Any) -> tuple[Any, Any]:
    """Return a message's channel and topic; of a part of a stream, those of the stream."""
    keys = (MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC)
    if tuple(map(message.get_header, keys)) == (STREAM_CHANNEL, STREAM_DATA_TOPIC):
        keys = (StreamHeaderKey.CHANNEL, StreamHeaderKey.TOPIC)
    channel, topic = map(message.get_header, keys)
    return channel, topic


def _is_job(job: Any) -> bool:
    return isinstance(job, str) and JOB_ID.fullmatch(job) is not None
