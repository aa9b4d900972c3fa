"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # else an invalid request


class ApiError(Exception):
    """A request that is answered with an error: its HTTP status, what is wrong, where, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        self.message, self.param = _encodable(message), param and _encodable(param)

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()  # JSON may name half of a surrogate pair


def handle_errors(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def own(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        is_json = "json" in request.headers.get("content-type", "")
        return (_invalid(error.errors()) if is_json else _NOT_JSON).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return ApiError(
            500, f"the server failed on this request ({type(error).__name__}); its log says more"
        ).response()


_NOT_JSON = ApiError(400, "the body is not marked as JSON: send it with the header Content-Type: application/json")


def _invalid(errors: Sequence[Any]) -> ApiError:
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where}: this server does not know the parameter", param=where, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where or 'body'}: {message}", param=where)
