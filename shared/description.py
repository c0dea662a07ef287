"""The OpenAPI description of a service: what its routes say of themselves, without what FastAPI adds on its own.

Its one invariant: no answer is described that the service does not give.
"""

from typing import Any

from fastapi import FastAPI

_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI, *, bearer: str | None = None) -> None:
    """Makes `app` leave out FastAPI's own 422 answers: here invalid input is answered by errors of ours.

    `bearer` tells of the token that calls which may be answered by 401 take, where the service asks for one.
    """
    build = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = build()
            for operations in schema.get("paths", {}).values():
                for operation in operations.values():
                    _drop_own_answers(operation)
                    if bearer and "401" in operation["responses"]:
                        operation["security"] = [{"token": []}, {}]
            if bearer:
                scheme = {"type": "http", "scheme": "bearer", "description": bearer}
                schema["components"]["securitySchemes"] = {"token": scheme}
            for name in _FASTAPIS_OWN:
                schema.get("components", {}).get("schemas", {}).pop(name, None)
        return app.openapi_schema or {}

    app.openapi = described  # type: ignore[method-assign]


def _drop_own_answers(operation: Any) -> None:
    answers = operation.get("responses", {}) if isinstance(operation, dict) else {}
    content = answers.get("422", {}).get("content", {}).get("application/json", {})
    if content.get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
        del answers["422"]
