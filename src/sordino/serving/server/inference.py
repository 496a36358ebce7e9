"""The Open Inference Protocol, version 2, as far as one picture encoder needs it: the same keys, limits and budgets.

https://github.com/kserve/open-inference-protocol: one input of type BYTES, whose elements are pictures in Base64; two
outputs, the names of the most probable classes, and their rounded probabilities.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, FailFast, Field, StrictInt, ValidationError

import sordino
from sordino.files import json_pieces
from sordino.serving.server.described import LOADED, SENT, key_needed, refusals, whole
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.service import Service

INPUT, CLASSES, PROBABILITIES = "image", "classes", "probabilities"

MOST_ELEMENTS = 1024  # of a list; how many pictures a request may have, is a limit of the server besides
MOST_PIECES = 4 * MOST_ELEMENTS  # of a body, see `json_pieces`: the parser makes an object of each


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TensorParameters(_Part):
    """Parameters of a tensor that clients of the protocol send unasked; the answer is the same without them."""

    content_type: Literal["base64"] | None = None
    binary_data: bool | None = None  # of an output: who takes binary tensors, takes those in JSON too


class InputTensor(_Part):
    """Pictures, one element each."""

    name: str
    # At the first error, as each one of many would take a kilobyte.
    shape: Annotated[list[int], Field(max_length=MOST_ELEMENTS), FailFast()]
    datatype: str
    parameters: TensorParameters = TensorParameters()
    data: Annotated[list[str], Field(max_length=MOST_ELEMENTS), FailFast()]


class OutputTensor(_Part):
    """An output that is asked for."""

    name: str
    parameters: TensorParameters = TensorParameters()


class Parameters(_Part):
    """Parameters of a request: how many classes are told."""

    top: StrictInt | None = None


class InferenceRequest(_Part):
    """A request of the protocol.

    Without `outputs`, or with none in it, all are answered.
    """

    id: Annotated[str, Field(max_length=200)] | None = None
    parameters: Parameters = Parameters()
    inputs: Annotated[list[InputTensor], Field(max_length=MOST_ELEMENTS), FailFast()]
    outputs: Annotated[list[OutputTensor], Field(max_length=MOST_ELEMENTS), FailFast()] = []


BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": whole(InferenceRequest)}}}
}


def routes(service: Service) -> APIRouter:
    """Make the protocol's addresses."""
    router = APIRouter(prefix="/v2", responses=refusals(422))
    with_key = key_needed(service.needs_key)
    named: dict[str, Any] = {"dependencies": with_key, "responses": refusals(*LOADED)}
    sent: dict[str, Any] = {"dependencies": with_key, "responses": refusals(*LOADED, *SENT, 415), "openapi_extra": BODY}

    @router.get("")
    async def server() -> dict[str, Any]:
        """Describe the server."""
        return {"name": "sordino", "version": sordino.__version__, "extensions": []}

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """Tell that the process answers."""
        return {"live": True}

    @router.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Tell that the registry can be read."""
        await service.apart(service.shelf.registry.ping)
        return {"ready": True}

    @router.get("/models/{name}", **named)
    @router.get("/models/{name}/versions/{version}", **named)
    async def model(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
        """Describe a prompt as a model."""
        await service.admit(request, "read")
        classifier = await service.take(name, version)
        assert classifier.manifest is not None
        versions = await service.apart(service.shelf.versions, name)
        return {
            "name": name,
            **_marked(classifier.manifest.mark),
            "versions": [str(each) for each in versions],
            "platform": "sordino",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": CLASSES, "datatype": "BYTES", "shape": [-1, -1]},
                {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, -1]},
            ],
        }

    @router.get("/models/{name}/ready", **named)
    @router.get("/models/{name}/versions/{version}/ready", **named)
    async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
        """Tell that a prompt can be asked."""
        await service.admit(request, "read")
        await service.take(name, version)
        return {"name": name, "ready": True}

    @router.post("/models/{name}/infer", **sent)
    @router.post("/models/{name}/versions/{version}/infer", **sent)
    async def infer(request: Request, name: str, version: str | None = None) -> dict[str, Any]:
        """Classify pictures."""
        key = await service.admit(request, "classify")
        # Here, so that nothing is read of whoever may not ask; elsewhere, so that nobody else waits for it.
        asked = await service.in_turn(key, _read, await request.body())
        top = service.top(asked.top)
        classifier, answers = await service.classify(request, key, name, version, asked.pictures, zero_shot=False)
        rows = [answer.classes[:top] for answer in answers]
        shape = [len(rows), len(rows[0])]
        names = [class_name for row in rows for class_name, _ in row]
        values = [value for row in rows for _, value in row]
        assert classifier.manifest is not None
        outputs = {
            CLASSES: {"name": CLASSES, "datatype": "BYTES", "shape": shape, "data": names},
            PROBABILITIES: {"name": PROBABILITIES, "datatype": "FP32", "shape": shape, "data": values},
        }
        return {
            "model_name": name,
            "model_version": str(classifier.manifest.version),
            **({} if asked.id is None else {"id": asked.id}),
            **_marked(classifier.manifest.mark),
            "outputs": [outputs[each] for each in asked.outputs],
        }

    return router


@dataclass(frozen=True)
class _Asked:
    """A request that was read: its pictures, and what is told of them."""

    id: str | None
    top: int | None
    outputs: list[str]
    pictures: list[bytes]


def _read(body: bytes) -> _Asked:
    """Read a request.

    Raises:
        Refusal: it is none of the protocol's, or asks for something that is not here.
    """
    if json_pieces(body) > MOST_PIECES:
        raise Refusal(422, f"the body has more than {MOST_PIECES:,} values")
    try:
        request = InferenceRequest.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(422, _told(error)) from None
    return _Asked(request.id, request.parameters.top, _outputs(request), _pictures(request))


def _told(error: ValidationError) -> str:
    """Tell the first error, without a name that the client made up."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    unknown = first["type"] == "extra_forbidden"
    names = first["loc"][:-1] if unknown else first["loc"]
    place = ".".join(map(str, names)) or "the body"
    if not unknown:
        return f"{place[:100]}: {first['msg'][:100]}"
    known = "; there is top" if place == "parameters" else ""
    return f"{place[:100]} has one that is not known here{known}"


def _outputs(body: InferenceRequest) -> list[str]:
    """Return the names of the outputs that are asked for, in this order.

    Raises:
        Refusal: there is no such output, or it is asked for twice.
    """
    asked = [output.name for output in body.outputs] or [CLASSES, PROBABILITIES]
    if not set(asked) <= {CLASSES, PROBABILITIES} or len(set(asked)) < len(asked):
        raise Refusal(422, f"outputs are {CLASSES!r} and {PROBABILITIES!r}, each once")
    return asked


def _marked(mark: str) -> dict[str, Any]:
    """Return the mark of a prompt that is not private, where the protocol has a place for it."""
    return {"parameters": {"mark": mark}} if mark else {}


def _pictures(body: InferenceRequest) -> list[bytes]:
    if len(body.inputs) != 1:
        raise Refusal(422, f"give one input, {INPUT!r}")
    (given,) = body.inputs
    if (given.name, given.datatype, given.shape) != (INPUT, "BYTES", [len(given.data)]):
        raise Refusal(422, f"the input must be {INPUT!r} of datatype BYTES, with the number of pictures as its shape")
    try:
        return [base64.b64decode(element, validate=True) for element in given.data]
    except (binascii.Error, ValueError):
        raise Refusal(422, "an element is no Base64") from None
