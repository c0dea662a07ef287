"""FastAPI's routes with strict bodies: the JSON is read by our rules, and limits come from settings. And what a path's
routes take together.

Its one invariant: a body is refused or it is exactly what the route gets; nothing is coerced.
"""

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar, get_args

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.routing import Match, Route
from starlette.types import Scope

from shared import json
from shared.errors import ValidationFailed

Model = TypeVar("Model", bound=BaseModel)


def validation_failed(errors: Sequence[Any], prefix: tuple[str, ...] = ()) -> ValidationFailed:
    """Pydantic's errors as `{type, loc, msg}`; what was sent is not repeated."""
    return ValidationFailed(
        [{"type": each["type"], "loc": [*prefix, *each["loc"]], "msg": each["msg"]} for each in errors]
    )


def allowed(routers: Iterable[APIRouter], scope: Scope) -> str:
    """The `Allow` of a 405: the router names the methods of the first route of a path alone; others of the path are
    routes of their own."""
    routes = [each for router in routers for each in router.routes if isinstance(each, Route)]
    found = [each for each in routes if each.matches(scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for each in found for method in each.methods or ()}))


class _ParsedRequest(Request):
    """A request whose body was read and checked before FastAPI looks at it."""

    def __init__(self, request: Request, value: BaseModel) -> None:
        headers = [(name, content) for name, content in request.scope["headers"] if name != b"content-type"]
        scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
        super().__init__(scope, request.receive)
        self._value = value

    async def body(self) -> bytes:
        return b"{}"  # not empty, so that FastAPI asks for json()

    async def json(self) -> Any:
        return self._value


class StrictRoute(APIRoute):
    """Reads a declared body as strict JSON, checks it with `app.state.limits` as context, names what is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        field = self.body_field
        model = _model(field.field_info.annotation) if field else BaseModel

        async def strict(request: Request) -> Response:
            try:
                raw = await request.body() if field else b""
                if field is None or not (raw or field.field_info.is_required()):
                    return await self.pass_on(request, None, handle)
                value = _parsed(raw)
                checked = _checked(model, value, request.app.state.limits)
                return await self.pass_on(_ParsedRequest(request, checked), value, handle)
            except RequestValidationError as error:
                raise validation_failed(error.errors()) from None

        return strict

    async def pass_on(self, request: Request, value: Any, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        """What stands between a checked body and the route; `value` is the body as it came."""
        return await handle(request)


async def read_body(request: Request, model: type[Model], limits: object) -> Model:
    """The request's body as a StrictRoute would take it. Raises ValidationFailed."""
    return _checked(model, _parsed(await request.body()), limits)


def _parsed(raw: bytes) -> dict[str, Any]:
    value = json.parse(raw)
    if not isinstance(value, dict):
        raise ValidationFailed.at("body", msg="The body is a JSON object", type="dict_type")
    return value


def _checked(model: type[Model], value: dict[str, Any], limits: object) -> Model:
    try:
        return model.model_validate(value, context=limits)
    except ValidationError as error:
        raise validation_failed(error.errors(include_url=False, include_input=False), ("body",)) from None


def _model(annotation: Any) -> type[BaseModel]:
    found: type[BaseModel] = next(each for each in (annotation, *get_args(annotation)) if _is_model(each))
    return found


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
