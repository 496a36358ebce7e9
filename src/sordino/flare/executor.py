"""A site's end inside FLARE: every task's bytes go to the site's turn, and its answer goes back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import make_reply

from sordino.errors import ConfigError, RunError, SordinoError
from sordino.flare.gate import OLD_KIT, is_shut
from sordino.flare.names import CONTENT, POLL, SITE_FILE, TASK
from sordino.sites.rhythm import Rhythm
from sordino.sites.settings import load_site
from sordino.sites.site import Site, refusal


class SiteExecutor(Executor):  # type: ignore[misc]
    """Answers tasks as the site's own file says.

    It takes no arguments: those of a component come from the job, which is to say from whoever submitted it. The path
    of the site's file is fixed, too. It is `local/site.toml` in the folder that the site's operator started FLARE in,
    which no job can write to or name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._site: Site | None = None
        self._rhythm = Rhythm(POLL, POLL)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Rest after an answer: FLARE asks for the next task once this returns."""
        if event_type == EventType.AFTER_SEND_TASK_RESULT:
            time.sleep(self._rhythm.answered())

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Return the site's answer to a task; a refusal where the site's file or data are not as they should be."""
        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        self._rhythm.asked()
        reply = make_reply(ReturnCode.OK)
        try:
            reply[CONTENT] = self._answer(bytes(shareable[CONTENT]), fl_ctx)
        except SordinoError as error:  # of opening the site; a turn raises none
            self.log_error(fl_ctx, f"the site cannot be opened: {error}", fire_event=False)
            reply[CONTENT] = refusal(str(error), _folder(fl_ctx))
        except Exception as error:
            # A failure of the program fails this one task. Its text may tell of data, so it stays in the site's log.
            self.log_exception(fl_ctx, "the site failed", fire_event=False)
            reply[CONTENT] = refusal(f"it failed with {type(error).__name__}; its own log says more")
        return reply

    def _answer(self, request: bytes, fl_ctx: Any) -> bytes:
        if not is_shut():
            raise RunError(f"this site {OLD_KIT}")
        if self._site is None:
            self._site = opened(_folder(fl_ctx) / SITE_FILE, fl_ctx.get_identity_name())
        return self._site.turn(request)


def _folder(fl_ctx: Any) -> Path:
    """Return the folder of the site's file."""
    return Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_site_config_dir())


def opened(file: Path, certified: str) -> Site:
    """Open the site of a file.

    Args:
        file: the site's, or a link to it.
        certified: the name in the certificate that this site shows the server.

    Raises:
        SordinoError: the file is missing or malformed, or of a site with another name.
    """
    settings = load_site(file)
    if settings.name != certified:
        raise ConfigError("name", settings.name, f"this site's certificate says {certified!r}; write the same here")
    return Site(settings)
