"""A service in two versions that receives and sends secrets: secrets_service.py VERSION PORT.

Each answer contains the secrets of the file SECRETS, which names them by their place. The secrets of new differ.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from abreast import ParallelRunMiddleware, effects

VERSION, PORT = sys.argv[1:]
SECRETS: dict[str, Any] = json.loads(Path(os.environ["SECRETS"]).read_text())[VERSION]


def encode(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


async def answer_json(request: Request) -> JSONResponse:
    await request.body()
    secret = SECRETS["json"]
    effects.record("email.send", {"to": "a", "nested": [{"password": SECRETS["effect"][0]}]}, key=SECRETS["effect"][1])
    effects.record("db.insert.users", {"sql": "insert", "params": {"api_key": SECRETS["effect"][2]}, "rows": 1})
    effects.record("call", {"text": f"token={SECRETS['effect'][3]}", "list": [SECRETS["effect"][4]]})
    headers = {
        "x-api-key": SECRETS["header"][0],
        "location": f"/next?access_token={SECRETS['header'][1]}",
        "x-info": SECRETS["header"][2],
    }
    response = JSONResponse(
        {
            "version": "same",
            "password": secret[0],
            "deep": [{"a": {"clientSecret": secret[1]}}],
            "inner": json.dumps({"token": secret[2], "list": [json.dumps({"pin": secret[3]})]}),
            "encoded": encode({"refresh_token": secret[4]}),
            "plain": secret[5],
            secret[6]: 1,
            "url": f"https://user:{secret[7]}@host.example/?key=1&api_key={secret[8]}",
            "error": f"login failed for a, password: {secret[9]}",
            "credentials": {"any": {"thing": secret[10]}},
            "session_id": [secret[11]],
        },
        headers=headers,
    )  # fmt: skip
    response.set_cookie("session", SECRETS["header"][3])
    return response


async def answer_text(request: Request) -> Response:
    await request.body()
    kind, secret = request.path_params["kind"], SECRETS["text"]
    contents = {
        "html": (f"<input name='csrf_token' value='{secret[0]}'><p>Bearer {secret[1]}</p>", "text/html"),
        "xml": (f"<a><password>{secret[2]}</password><b token='{secret[3]}'/></a>", "application/xml"),
        "plain": (f"DB_PASSWORD={secret[4]}\n{secret[5]}\n", "text/plain"),
        "form": (f"token={secret[6]}&a=1", "application/x-www-form-urlencoded"),
        "events": (f'data: {{"secret": "{secret[7]}"}}\n\n', "text/event-stream"),
        "image": (f"\x89PNG\r\n\0{secret[8]}", "image/png"),
        "ndjson": (f'{{"a": 1}}\n{{"otp": "{secret[9]}"}}\n', "application/x-ndjson"),
    }
    content, media_type = contents[kind]
    return PlainTextResponse(content, media_type=media_type)


async def fail(_request: Request) -> Response:
    raise ValueError(f"password={SECRETS['text'][10]}")


async def healthy(_request: Request) -> JSONResponse:
    return JSONResponse({"ok": True})


methods = ["GET", "POST"]
app = Starlette(
    routes=[
        Route("/healthz", healthy),
        Route("/fail", fail, methods=methods),
        Route("/text/{kind}", answer_text, methods=methods),
        Route("/{rest:path}", answer_json, methods=methods),
    ]
)
app.add_middleware(ParallelRunMiddleware, service="shop", release=f"{VERSION}-1")
uvicorn.run(app, host="127.0.0.1", port=int(PORT), log_level="critical")
