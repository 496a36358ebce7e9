"""The server's questions to many clients, and the checks of their replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sordino.secure.distances import Exchange
from sordino.secure.errors import SecureError
from sordino.secure.messages import AnyMessage, Message, expect


@dataclass(frozen=True)
class Rejection:
    """A message that was rejected, or a client that is not asked any more.

    Attributes:
        client: the sender.
        step: the step of the protocol.
        reason: the reason.
    """

    client: int
    step: str
    reason: str


class Mailbox:
    """Sends questions, and records the clients with missing or wrong replies.

    Args:
        round: the round; messages of any other are late.
        clients: the clients to ask.
        most: the longest reply that is read, in bytes.

    Attributes:
        rejected: the rejected messages and their senders.
        excluded: the clients that are not asked any more.
    """

    def __init__(self, round: int, clients: Iterable[int], most: int | None = None) -> None:
        self.round, self.clients, self.most = round, tuple(clients), most
        self.rejected: list[Rejection] = []
        self.excluded: set[int] = set()

    def ask(
        self,
        question: Message | dict[int, Message],
        kind: type[AnyMessage],
        step: str,
        wrong: Callable[[AnyMessage], str | None] = lambda message: None,
    ) -> Exchange[dict[int, AnyMessage]]:
        """Send one question to everybody, or one to each; return the first good reply of each, by client.

        If anything is wrong with a message, its sender is recorded, and the others continue without
        it.
        """
        if isinstance(question, Message):
            messages = dict.fromkeys(self.clients, question.to_bytes())
        else:
            messages = {client: message.to_bytes() for client, message in question.items()}
        for client in self.excluded:
            messages.pop(client, None)
        replies: dict[int, AnyMessage] = {}
        for sender, content in (yield messages):
            try:
                if sender not in messages:
                    raise SecureError("not asked: it does not take part, or does no more")
                message = expect(content, kind, self.most)
                if getattr(message, "sender", sender) != sender:
                    raise SecureError(
                        f"malformed: it speaks for client {getattr(message, 'sender', None)}",
                    )
                if message.round != self.round:
                    raise SecureError(f"late: of round {message.round} in round {self.round}")
                if reason := wrong(message):
                    raise SecureError(reason)
                if sender in replies:
                    raise SecureError("duplicated: it has answered this already")
                replies[sender] = message
            except SecureError as error:
                self.reject(sender, step, str(error))
        return replies

    def keep_common(
        self,
        replies: dict[int, AnyMessage],
        step: str,
        length: Callable[[AnyMessage], int],
    ) -> None:
        """Leave out replies whose length differs from most: sealed payloads and keys have one length for all."""
        lengths = {sender: length(message) for sender, message in replies.items()}
        usual = Counter(lengths.values()).most_common(1)[0][0] if lengths else 0
        for sender in [sender for sender in replies if lengths[sender] != usual]:
            del replies[sender]
            self.reject(sender, step, f"malformed: {lengths[sender]} bytes where most sent {usual}")

    def exclude(self, client: int, step: str, reason: str) -> None:
        """Record a client, and ask it no more."""
        self.excluded.add(client)
        self.reject(client, step, reason)

    def reject(self, client: int, step: str, reason: str) -> None:
        """Record a client whose message is rejected."""
        self.rejected.append(Rejection(client, step, reason))
