"""The Open Inference Protocol, version 2, as far as one picture encoder needs it: the same keys, limits and budgets.

https://github.com/kserve/open-inference-protocol: one input of type BYTES, whose elements are pictures in Base64; two
outputs, the names of the most probable classes, and their rounded probabilities.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, FailFast, Field, ValidationError

import sordino
from sordino.serving.server.described import LOADED, SENT, key_needed, refusals, whole
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.service import Service

INPUT, CLASSES, PROBABILITIES = "image", "classes", "probabilities"


MOST_ELEMENTS = 1024  # of a list; how many pictures a request may have, is a limit of the server besides


class InputTensor(BaseModel):
    """Pictures, one element each."""

    name: str
    # At the first error, as each one of millions would take a kilobyte.
    shape: Annotated[list[int], Field(max_length=MOST_ELEMENTS), FailFast()]
    datatype: str
    data: Annotated[list[str], Field(max_length=MOST_ELEMENTS), FailFast()]


class OutputTensor(BaseModel):
    """An output that is asked for."""

    name: str


class InferenceRequest(BaseModel):
    """A request of the protocol; `parameters.top` is how many classes are told.

    Without `outputs`, or with none in it, all are answered.
    """

    id: Annotated[str, Field(max_length=200)] | None = None
    inputs: Annotated[list[InputTensor], Field(max_length=MOST_ELEMENTS), FailFast()]
    outputs: Annotated[list[OutputTensor], Field(max_length=MOST_ELEMENTS), FailFast()] = []
    parameters: dict[str, Any] = {}


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
        try:  # here, so that nothing is read of whoever may not ask
            body = InferenceRequest.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the body"
            raise Refusal(422, f"{place[:100]}: {first['msg'][:100]}") from None
        if not body.parameters.keys() <= {"top"}:
            raise Refusal(422, "parameters has one that is not known here; there is top")
        told = _asked(body)
        asked = body.parameters.get("top")
        if asked is not None and type(asked) is not int:
            raise Refusal(422, "parameters.top must be a whole number")
        top = service.top(asked)
        contents = _pictures(body)
        classifier, answers = await service.classify(request, key, name, version, contents, zero_shot=False)
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
            **({} if body.id is None else {"id": body.id}),
            **_marked(classifier.manifest.mark),
            "outputs": [outputs[each] for each in told],
        }

    return router


def _asked(body: InferenceRequest) -> list[str]:
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
