"""Questions and answers as messages of Flower's: bytes in records of a few megabytes, each of which is one request.

A question bears a token that its site alone learns, and the answer must bear it, too: Flower checks who sends a reply,
but takes the sender's word for which question it answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from sordino.flower.names import CONTENT, PART, RECORD, SITE, TOKEN

TRAIN = "train"  # the kind of message that plain apps answer with their function `train`

# Flower's codes of errors, in words; other texts are the node's own.
ERRORS = {
    3: "its answer was lost on its way",
    4: "its answer came too late for Flower",
    5: "its node is not connected any more",
}


@dataclass(frozen=True)
class Question:
    """A question as a node takes it.

    Attributes:
        site: the name that the server's file has for the node's key.
        token: to send back.
        content: the request's bytes.
    """

    site: str
    token: bytes
    content: bytes


def question(node: int, asked: Question, number: int, seconds: float) -> Message:
    """Return a message to a node.

    Args:
        node: its number.
        asked: the question.
        number: of the round.
        seconds: after which the message is not brought any more.
    """
    content = _records({SITE: asked.site, TOKEN: asked.token}, asked.content)
    return Message(content, node, TRAIN, ttl=seconds, group_id=str(number))


def read_question(message: Message) -> Question:
    """Read a question.

    Raises:
        ValueError: it is none.
    """
    about = _about(message)
    site, token = about.get(SITE), about.get(TOKEN)
    if not isinstance(site, str) or not isinstance(token, bytes):
        raise ValueError("a message without name and token")
    return Question(site, token, _content(message))


def answer(asked: Message, token: bytes, content: bytes) -> Message:
    """Return the reply to a message."""
    return Message(_records({TOKEN: token}, content), reply_to=asked)


def read_answer(reply: Message, token: bytes) -> bytes | str:
    """Return a reply's bytes, or why it has none."""
    if reply.has_error():
        return ERRORS.get(reply.error.code, f"it failed with error {reply.error.code} of Flower's")
    try:
        if _about(reply).get(TOKEN) != token:
            raise ValueError("an answer without the question's token")
        return _content(reply)
    except ValueError as error:
        return f"it sent {error}"


def _records(about: dict[str, str | bytes], content: bytes) -> RecordDict:
    """Return records: the first one with what is about the message, and a part of the content in each."""
    first = ConfigRecord({**about, CONTENT: content[:PART]})
    starts = range(PART, len(content), PART)
    more = {f"{RECORD}{start // PART}": ConfigRecord({CONTENT: content[start : start + PART]}) for start in starts}
    return RecordDict({RECORD: first, **more})


def _about(message: Message) -> ConfigRecord:
    about = message.content.get(RECORD) if message.has_content() else None
    if not isinstance(about, ConfigRecord):
        raise ValueError("a message that is none of Sordino's")
    return about


def _content(message: Message) -> bytes:
    records = [_about(message)]
    while isinstance(more := message.content.get(f"{RECORD}{len(records)}"), ConfigRecord):
        records.append(more)
    parts = [record.get(CONTENT) for record in records]
    if len(records) < len(message.content) or not all(isinstance(part, bytes) for part in parts):
        raise ValueError("a message that does not hold bytes alone")
    return b"".join(part for part in parts if isinstance(part, bytes))
