"""A site: it answers hello, agreement, rounds, evaluations and the end by its own policy, data and state."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from sordino.errors import ConfigError, RunError, SordinoError
from sordino.experiments.run_lock import InUse, held_in_turn
from sordino.files import require_private, write_private
from sordino.progress import log
from sordino.randomness import system_bytes
from sordino.runtime.envelope import Envelope
from sordino.runtime.messages import MessageError
from sordino.sites.ledger import EXPERIMENTS, SiteLedger
from sordino.sites.membership import Membership, read_document
from sordino.sites.policy import objections
from sordino.sites.proposal import OWN, Proposal
from sordino.sites.settings import FINGERPRINT, SiteSettings, is_fingerprint

PROPOSED = "proposal.json"  # in the folder of an experiment
LAST = "process"  # in the state folder, and in that of each experiment: which process answered last
OWNER = "site"  # there too: the name of the site whose state it is
FAULT = "something went wrong here"  # told where no refusal says what
WAIT = 60.0  # seconds that a request waits while this site answers another one; a tenth of a round's usual deadline
BUSY = "this site answers another request; ask again"
PATH = re.compile(r"(?<![\w.:/])(/|[A-Za-z]:[\\/])[^\s/\\]")  # the start of an absolute one


class Site:
    """A site: every engine hands it requests, and takes its answers.

    Args:
        settings: of the site's file.
        wait: seconds that a request waits while another process of this site answers one.

    Raises:
        RunError: its state folder is another site's, or damaged.
    """

    def __init__(self, settings: SiteSettings, wait: float = WAIT) -> None:
        self.settings, self.state, self._wait = settings, Path(settings.state), wait
        self._check_owner()
        self.ledger = SiteLedger.of_state(self.state)
        self._members: dict[str, Membership] = {}
        self._name = system_bytes(16).hex()  # of this process
        self._looked_at_state = False

    def turn(self, request: bytes) -> bytes:
        """Return the answer to a request, whatever its bytes are. A refusal says why; no error is raised.

        The same request gets the same answer, however often it comes, and to whichever process of this site. Several of
        them answer one after another. Who waits in vain says so: that is no refusal, and nothing happened.
        """
        try:
            self._make_private()
            with held_in_turn(self.state, self._wait):
                self._take_over()
                return self._answer(request)
        except InUse:
            log.info("a request is to come again, as another one took more than %g s", self._wait)
            return Envelope("busy", "", {"reason": BUSY}).encode()
        except SordinoError as error:
            return self._refusal("", error)
        except Exception as error:  # a fault of this program's, or a file that cannot be opened; nothing left
            log.exception("no answer to a request")
            told = {"reason": f"{FAULT} ({type(error).__name__}); its log says more", "site": self.settings.name}
            return Envelope("refusal", "", told).encode()

    def _make_private(self) -> None:
        """Have a state folder that is the owner's alone, or warn once: it holds prompts, and answers without noise."""
        if not self._looked_at_state:
            require_private(self.state, "let its owner alone enter it (chmod 700), in backups too")
            self._looked_at_state = True

    def _take_over(self) -> None:
        """Read the ledger again if another process of this site has answered since this one did."""
        file = self.state / LAST
        if self._answered_last(file):
            return
        if not self._check_owner():
            write_private(self.state / OWNER, self.settings.name.encode())
        self.ledger.renew()
        write_private(file, self._name.encode())

    def _answered_last(self, file: Path) -> bool:
        """Return whether this process is the one that a file says answered last."""
        return file.exists() and file.read_text() == self._name

    def _check_owner(self) -> bool:
        """Return whether the state folder is known to be this site's. One without a name is that of who answers first.

        Raises:
            RunError: it is another site's, whose answers and ledger would be taken for this one's.
        """
        file = self.state / OWNER
        try:
            owner = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        except OSError as error:
            raise RunError(f"{file}: {error.strerror or error}; let this process read it") from None
        if owner and owner != self.settings.name:
            raise RunError(
                f"the state folder in the file of site {self.settings.name!r} is that of site {owner!r}, with its "
                "answers and ledger; set another `state` there, or give the site its old name back"
            )
        return bool(owner)

    def _refusal(self, experiment: str, error: SordinoError) -> bytes:
        """Return a refusal. An error of data may name files or persons, so its text stays in the site's own log."""
        reason, places = str(error), (str(self.state), str(self.state.resolve()))
        # What was proposed may be told; what is in the site's own tables may not.
        proposed = isinstance(error, ConfigError) and error.key.partition(".")[0] not in (*OWN, "encoder", "policy")
        for place in places:
            reason = reason.replace(place, "state")
        if not (proposed or (isinstance(error, MessageError | RunError) and not PATH.search(reason))):
            log.error("refused: %s", error)
            reason = f"its own data or file is not as it should be ({type(error).__name__}); its log says more"
        return Envelope("refusal", experiment, {"reason": reason, "site": self.settings.name}).encode()

    def _answer(self, request: bytes) -> bytes:
        experiment = ""
        try:
            if len(request) > self.settings.policy.most_bytes:
                most = self.settings.policy.most_bytes
                raise MessageError(f"a request of {len(request):,} bytes, and policy.most_bytes = {most:,}")
            envelope = Envelope.decode(request)
            if not is_fingerprint(envelope.experiment):  # it comes from a message, and names a folder
                raise MessageError(f"an experiment's fingerprint has {FINGERPRINT} hexadecimal digits")
            experiment = envelope.experiment
            if not self._answered_last(self.folder(experiment) / LAST):
                self._members.pop(experiment, None)  # a secure sum of another experiment goes on
            if envelope.kind == "hello":
                return self.hello(envelope)
            member = self._member(experiment)
            if envelope.kind == "agreement":
                return member.agree(envelope.facts)
            turns = member.newest_turns(envelope.facts)
            if envelope.kind == "round":
                return turns.turn(request)
            if envelope.kind == "evaluate":
                return member.evaluate(envelope)
            if envelope.kind == "end":
                return member.end(envelope)
            raise MessageError(f"a {envelope.kind} is no request")
        except SordinoError as error:
            return self._refusal(experiment, error)

    def hello(self, envelope: Envelope) -> bytes:
        """Answer who is here, or why this site takes no part.

        Raises:
            SordinoError: the policy forbids it, the budget does not suffice, or data or encoder are not there.
        """
        proposal = Proposal.read(envelope.facts)
        if proposal.fingerprint != envelope.experiment:
            raise MessageError(f"the proposal is of experiment {proposal.fingerprint}")
        if found := objections(self.settings.policy, proposal):
            raise MessageError("; ".join(found))
        member = self._members.get(proposal.fingerprint)
        if member is None:
            member = self.membership(proposal)
        facts = member.hello().facts
        file = self.folder(proposal.fingerprint) / PROPOSED
        write_private(file, json.dumps(proposal.facts, indent=1).encode())
        self._keep(proposal.fingerprint, member)
        return Envelope("hello", proposal.fingerprint, facts).encode()

    def _member(self, experiment: str) -> Membership:
        """Return what this site is in an experiment, also after a restart."""
        if experiment not in self._members:
            folder = self.folder(experiment)
            if not (folder / PROPOSED).exists():
                raise MessageError(f"this site has not joined experiment {experiment[:12]}; say hello first")
            proposal = Proposal.read(read_document(folder / PROPOSED))
            if found := objections(self.settings.policy, proposal):  # the policy may have changed
                raise MessageError("; ".join(found))
            member = self.membership(proposal)
            member.resume()
            self._keep(experiment, member)
        return self._members[experiment]

    def _keep(self, experiment: str, member: Membership) -> None:
        """Remember what this site is in an experiment, for as long as no other process of it answers there."""
        file = self.folder(experiment) / LAST
        if not self._answered_last(file):
            write_private(file, self._name.encode())
        self._members[experiment] = member

    def membership(self, proposal: Proposal) -> Membership:
        """Return what this site would be in an experiment; nothing is kept of it."""
        return Membership(self.settings, self.ledger, self.folder(proposal.fingerprint), proposal)

    def folder(self, experiment: str) -> Path:
        """Return where the state of an experiment is."""
        return self.state / EXPERIMENTS / experiment


def refusal(reason: str, folder: Path | None = None) -> bytes:
    """Return the answer of a site that cannot even read a request. A reason that names a path stays at the site.

    Args:
        reason: in words.
        folder: of the site's file, whose name alone is told.
    """
    told = reason if folder is None else reason.replace(f"{folder}{os.sep}", "")
    told = f"{FAULT}; its log says more" if PATH.search(told) else told
    return Envelope("refusal", "", {"reason": told}).encode()
