"""The front page: what is served where, and calls to try, in English and Chinese.

Its one invariant: it holds no key, no path of the machine, and nothing from a request that is not an address.
"""

import json
import shlex
from html import escape
from typing import Final

from fastapi import APIRouter, FastAPI, Request, Response

from services.relay.accounts import DEMO_MODEL
from services.relay.pool import Pool
from services.relay.routes.addresses import address_of
from services.relay.routes.parameters import AppState
from services.relay.state import State
from shared import __version__

router = APIRouter(include_in_schema=False)

_USUAL_MODEL: Final = "claude-sonnet-4-5"
_HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}

Texts = tuple[str, str]
"""The same in English and in Chinese."""

_SERVED: Final[tuple[tuple[str, str, Texts], ...]] = (
    ("/v1/messages", "POST", ("Claude Messages, with sessions that are kept", "Claude Messages，会话会保存下来")),
    ("/v1/messages/count_tokens", "POST", ("the tokens of a request", "请求的 token 数")),
    ("/v1/models", "GET", ("the models there are", "可用的模型")),
    ("/v1/turns/{turn_id}", "GET", ("what became of a turn", "一轮对话的结果")),
    ("/sessions/{session_id}", "GET", ("a session", "查看会话")),
    ("/sessions/{session_id}/close", "POST", ("ends a session; its history stays", "关闭会话，历史保留")),
    ("/api/chat", "POST", ("a chat in one call", "简单的聊天接口")),
    ("/api/chat/stream", "POST", ("the same, as it is written", "同上，流式输出")),
    ("/api/sessions", "GET", ("the chats that go on", "聊天会话列表")),
    ("/api/v1/app-conversations", "POST, GET", ("conversations, V1: started, looked at", "对话 V1：启动、查看")),
    ("/api/conversations", "POST, GET", ("conversations, V0", "对话 V0")),
    (
        "/api/conversations/{id}/events",
        "POST, GET",
        ("what is said in one (its own key)", "对话中的消息（对话自己的密钥）"),
    ),
    ("/api/conversations/{id}/run", "POST", ("goes on; /pause stops it", "继续运行；/pause 暂停")),
    ("/api/file/upload/{path}", "POST", ("files of a conversation", "对话的文件")),
    ("/queue/health", "GET", ("load and accounts", "负载与账号状态")),
    ("/admin/accounts", "GET, POST …", ("upstream accounts (admin token)", "上游账号（管理令牌）")),
    ("/admin/api-keys", "GET, POST …", ("keys of callers (admin token)", "API Key（管理令牌）")),
    ("/admin/session-pool/stats", "GET, POST …", ("the session pool (admin token)", "会话池（管理令牌）")),
)
_PAGES: Final[tuple[tuple[str, Texts], ...]] = (
    ("/docs", ("the calls, to be tried out", "接口文档，可在线试用")),
    ("/openapi.json", ("the same for programs", "OpenAPI 描述")),
    ("/health", ("whether it takes requests", "健康检查")),
    ("/metrics", ("figures for Prometheus", "Prometheus 指标")),
)
_STYLE: Final = (
    "body{max-width:56rem;margin:2rem auto;padding:0 1rem;font:16px/1.5 system-ui,sans-serif;color:#222;"
    "background:#fff}table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0;vertical-align:top}"
    "pre{padding:.6rem;background:#f3f3f3;white-space:pre-wrap;overflow-wrap:anywhere}code{font-size:14px}"
    "[lang=zh-CN]{color:#555}"
)


@router.get("/")
async def get_front(request: Request, state: AppState) -> Response:
    """The page. It needs no key and no script."""
    parts = [
        "<h1>relay</h1>",
        _both(
            "p",
            (
                "The Claude Messages API with sessions that are kept: send only what is new, or everything again.",
                "带会话的 Claude Messages 接口：只发送新消息，或者重新发送全部历史，都可以。",
            ),
        ),
        _pages(),
        _both("h2", ("Calls", "接口")),
        _served(request.app),
        _both("h2", ("Try it", "试一试")),
        *_key_hint(state),
        *(_both("p", texts) + f"<pre><code>{escape(line)}</code></pre>" for texts, line in _lines(request, state)),
        f"<p>relay {escape(__version__)}</p>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n<title>relay</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
    return Response(page, media_type="text/html", headers=_HEADERS)


def _both(tag: str, texts: Texts) -> str:
    english, chinese = map(escape, texts)
    return f'<{tag}>{english} <span lang="zh-CN">{chinese}</span></{tag}>'


def _pages() -> str:
    rows = (f'<tr><td><a href="{path}">{path}</a></td>{_both("td", texts)}</tr>' for path, texts in _PAGES)
    return f"<table>{''.join(rows)}</table>"


def _served(app: FastAPI) -> str:
    rows = (
        f"<tr><td>{escape(methods)}</td><td><code>{escape(path)}</code></td>{_both('td', texts)}</tr>"
        for path, methods, texts in _SERVED
        if path in app.openapi()["paths"]
    )
    return f"<table>{''.join(rows)}</table>"


# ── calls to try ────────────────────────────────────────────────────────────────────────────────


def _key_hint(state: State) -> list[str]:
    """Where a key is to be had."""
    if state.secrets.api_key is None:
        texts = (
            "RELAY_KEY is your API key; an administrator makes one at /admin/api-keys.",
            "RELAY_KEY 是你的 API Key，由管理员在 /admin/api-keys 创建。",
        )
        return [_both("p", texts)]
    texts = (
        "RELAY_KEY is your API key. Here, in development, one is in DATA_DIR/api.key; in the project's folder:",
        "RELAY_KEY 是你的 API Key。开发环境的 Key 在 DATA_DIR/api.key 里；在项目目录下执行：",
    )
    line = f'export RELAY_KEY="$(cat "${{DATA_DIR:-.data/{state.settings.environment}}}/api.key")"'
    return [_both("p", texts), f"<pre><code>{escape(line)}</code></pre>"]


def _lines(request: Request, state: State) -> list[tuple[Texts, str]]:
    """Lines for a shell, with what they do."""
    base, model = address_of(request), _model(state.pool)

    def get(path: str, *, needs_key: bool = True) -> str:
        return f"curl -s {base}{path}" + (' -H "x-api-key: $RELAY_KEY"' if needs_key else "")

    def post(path: str, body: object, options: str = "-s") -> str:
        data = shlex.quote(json.dumps(body, ensure_ascii=False))
        headers = "-H \"x-api-key: $RELAY_KEY\" -H 'content-type: application/json'"
        return f"curl {options} {base}{path} {headers} -d {data}"

    def message(text: str, *, stream: bool = False) -> dict[str, object]:
        asked = {"model": model, "max_tokens": 200, "messages": [{"role": "user", "content": text}]}
        return asked | {"metadata": {"session_id": "first-session"}} | ({"stream": True} if stream else {})

    lines = [
        (("Say something in a session.", "在会话里说一句话。"), post("/v1/messages", message("My name is Ada."))),
        (
            ("It is remembered; this answer is streamed.", "会话记得住；这次用流式回答。"),
            post("/v1/messages", message("What is my name?", stream=True), "-sN"),
        ),
        (("Look at the session.", "查看会话。"), get("/sessions/first-session")),
        (("The models there are.", "可用的模型。"), get("/v1/models")),
        (("Load and accounts; needs no key.", "负载与账号，不需要 Key。"), get("/queue/health", needs_key=False)),
    ]
    if "/api/chat" in request.app.openapi()["paths"]:
        chat = {"message": "你好", "model": model}
        lines.insert(3, (("The same as a simple chat.", "简单的聊天接口。"), post("/api/chat", chat)))
    return lines


def _model(pool: Pool) -> str:
    """A model to try: the demo, else one that an account names."""
    accounts = [member.account for member in pool.members.values() if member.enabled]
    if any(account.provider == "demo" for account in accounts):
        return DEMO_MODEL
    return next((name for account in accounts for name in account.models), _USUAL_MODEL)
