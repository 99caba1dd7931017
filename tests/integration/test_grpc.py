"""A real grpcio service in two versions behind Envoy, compared by fields and by bytes."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from abreast.v1 import common_pb2 as common
from abreast.v1 import comparison_pb2 as api
from abreast_sidecar.cli.pairs import build_curl_line
from support import eventually_async, find_free_port
from support_grpc import SERVICE, Shop, ShopClient, compile_descriptors, make_product, reorder, write_config
from support_up import Up, kill_sidecar

SECRET = "hunter2-of-the-user"


async def get_old(_request: Any, _context: Any) -> Any:
    return make_product(password=SECRET)


async def get_equal(_request: Any, _context: Any) -> bytes:
    return reorder(make_product(password=SECRET))


async def list_old(_request: Any, _context: Any) -> AsyncIterator[Any]:
    for number in range(3):
        yield make_product(stock=number, password=SECRET)


async def list_dearer(_request: Any, _context: Any) -> AsyncIterator[Any]:
    async for product in list_old(_request, _context):
        product.price += product.stock == 1
        product.password += "x"
        yield product


async def buy_old(_request: Any, context: Any) -> Any:
    await context.abort(grpc.StatusCode.NOT_FOUND, "no such product")


async def buy_new(_request: Any, context: Any) -> Any:
    await context.abort(grpc.StatusCode.INTERNAL, "no such product")


OLD = {"GetProduct": get_old, "ListProducts": list_old, "Buy": buy_old}
NEW = {"GetProduct": get_equal, "ListProducts": list_dearer, "Buy": buy_new}


@contextlib.asynccontextmanager
async def started(up: Up) -> AsyncIterator[ShopClient]:
    await asyncio.to_thread(up.__enter__)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{up.listen}") as channel:
            client = ShopClient(channel)

            async def is_serving() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await client.call("GetProduct")
                    return True
                return False

            await eventually_async(is_serving, description="Envoy reaches the versions")
            yield client
    finally:
        await asyncio.to_thread(up.__exit__)


async def send_calls(client: ShopClient, count: int) -> None:
    for _ in range(count):
        assert (await client.call("GetProduct")).name == "Tea"
        assert [part.stock for part in await client.stream()] == [0, 1, 2]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.call("Buy")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def read_findings(up: Up) -> dict[str, set[tuple[str, str]]]:
    """Return the places and kinds of the findings by method."""
    findings = (await asyncio.to_thread(up.json, "findings", "--each"))["findings"]
    places: dict[str, set[tuple[str, str]]] = {}
    for finding in findings:
        method = finding["endpoint"]["route"].rpartition("/")[2]
        places.setdefault(method, set()).add((finding["part"], finding["path"]))
    return places


async def test_killed_collectors_harm_no_call(tmp_path: Path) -> None:
    async with Shop(OLD).serve() as old, Shop(OLD).serve() as new:
        up = Up(0, 0, config=write_config(tmp_path / "abreast.yaml", old.port, new.port))
        async with started(up) as client:
            is_over = False

            async def call() -> None:
                while not is_over:
                    await client.call("GetProduct")
                    await asyncio.sleep(0.02)

            load = asyncio.create_task(call())
            for _ in range(2):
                await asyncio.to_thread(kill_sidecar, up)
            pairs = int((await asyncio.to_thread(up.json, "status"))["summary"]["pairs"])
            await asyncio.to_thread(up.wait_for_pairs, pairs + 20)
            is_over = True
            await load  # raises the error of a call

            async def is_settled() -> bool:
                summary = (await asyncio.to_thread(up.json, "status"))["summary"]
                known = int(summary["pairs"]) + int(summary.get("unaccounted", -1))
                sampled = int(summary.get("envoy_sampled", 0))
                return sampled == known == len(old.live_calls) and bool(summary["pending"] == "0")

            await eventually_async(is_settled, description="pairs and lost calls are as many as Envoy sampled")
            assert await read_findings(up) == {}


@pytest.mark.parametrize("source", ["file", "reflection"])
async def test_calls_are_compared_by_fields(source: str, tmp_path: Path) -> None:
    compression = grpc.Compression.Gzip if source == "file" else grpc.Compression.NoCompression
    async with Shop(OLD).serve() as old, Shop(NEW, with_reflection=True, compression=compression).serve() as new:
        (tmp_path / "shop.pb").write_bytes(compile_descriptors())
        descriptors = str(tmp_path / "shop.pb") if source == "file" else f"grpc://127.0.0.1:{new.port}"
        config = write_config(tmp_path / "abreast.yaml", old.port, new.port, descriptors)
        up = Up(0, 0, config=config)
        async with started(up) as client:
            await send_calls(client, 5)
            await asyncio.to_thread(up.wait_for_pairs, 16)

            places = await read_findings(up)
            compression_place = {("PART_HEADER", "grpc-encoding")} if source == "file" else set()
            assert places.pop("GetProduct", set()) == compression_place
            places["ListProducts"].discard(
                ("PART_BODY", "$[*].password")
            )  # hashes differ by their shape: noise after a while
            assert places == {
                "ListProducts": {("PART_BODY", "$[*].price")} | compression_place,
                "Buy": {("PART_HEADER", "trailer grpc-status")},
            }
            pairs = (await asyncio.to_thread(up.json, "pairs"))["pairs"]
            bought = {(row["old_status"], row["new_status"]) for row in pairs if row["request"].endswith("/Buy")}
            assert bought == {(404, 500)}  # so that guard and verdict count errors of new
            everything = await asyncio.to_thread(up.json, "findings", "--each", "--all")
            assert SECRET not in str(everything)
            [secret] = [row for row in everything["findings"] if row["path"] == "$[*].password"]
            assert secret["summary"].startswith('"hmac:')

            async def is_counted() -> bool:
                summary = (await asyncio.to_thread(up.json, "status"))["summary"]
                reasons = {row["reason"] for row in summary.get("unconverted", ())}
                return reasons == {"grpc_unknown_fields"} and summary.get("unaccounted") == "0"

            await eventually_async(is_counted, description="the collector reports its counts, and nothing is missing")


async def test_calls_without_their_descriptors_are_compared_by_bytes(tmp_path: Path) -> None:
    """A descriptor set of another service, and one whose message does not fit, stop nothing."""
    other = compile_descriptors().replace(b"GetProduct", b"GetOthers_").replace(b"price", b"title")
    (tmp_path / "other.pb").write_bytes(other)
    async with Shop(OLD).serve() as old, Shop({**OLD, "GetProduct": get_equal}).serve() as new:
        config = write_config(tmp_path / "abreast.yaml", old.port, new.port, str(tmp_path / "other.pb"))
        up = Up(0, 0, config=config)
        async with started(up) as client:
            await send_calls(client, 3)
            await asyncio.to_thread(up.wait_for_pairs, 10)

            assert await read_findings(up) == {"GetProduct": {("PART_BODY", "")}}
            expected = [{"stage": "collector", "reason": "grpc_unknown_method", "count": "8"}]

            async def is_counted() -> bool:
                return bool((await asyncio.to_thread(up.json, "status"))["summary"].get("unconverted") == expected)

            await eventually_async(is_counted, description="the collector reports its counts")
            assert "compared by their bytes" in (await asyncio.to_thread(up.command, "status")).stdout


async def test_printed_line_repeats_a_call(tmp_path: Path) -> None:
    detail = api.PairDetail(
        request_target=f"/{SERVICE}/GetProduct",
        request_body=b'{"name":"Green \'tea\'"}',
        request_headers=[
            common.Header(name="content-type", value="application/grpc+json"),
            common.Header(name="x-user", value="ann"),
        ],
    )
    (tmp_path / "shop.binpb").write_bytes(compile_descriptors())
    requests: list[Any] = []

    async def answer(request: Any, context: Any) -> Any:
        requests.append((request.name, dict(context.invocation_metadata())["x-user"]))
        return make_product()

    async with Shop({"GetProduct": answer}).serve() as shop:
        line, omissions = build_curl_line(detail, f"http://127.0.0.1:{shop.port}")
        command = line.replace("buf curl", f"{Path(sys.executable).parent}/buf curl --schema {tmp_path}/shop.binpb")
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)

    assert not omissions
    assert (process.returncode, requests) == (0, [("Green 'tea'", "ann")]), output.decode()


async def test_call_fails_over_only_if_it_was_not_processed(tmp_path: Path) -> None:
    """A version that answers UNAVAILABLE may have processed the call. One that is down has not."""

    async def refuse(_request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "overloaded")

    new_port = find_free_port()
    async with Shop(OLD).serve() as old:
        config = write_config(tmp_path / "abreast.yaml", old.port, new_port)
        up = Up(0, 0, config=config)
        async with started(up) as client:
            async with Shop({**OLD, "GetProduct": refuse}).serve(new_port) as new:

                async def is_on_new() -> bool:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await client.call("GetProduct")
                        return False
                    return True

                await asyncio.to_thread(up.json, "traffic", "set", "--new", "100%", "--reason", "a test")
                await eventually_async(is_on_new, description="new answers users")
                before = len(old.live_calls)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await client.call("GetProduct")
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert new.live_calls
                assert len(old.live_calls) == before

            for _ in range(5):  # new is down
                assert (await client.call("GetProduct")).name == "Tea"
            before = len(old.live_calls)
            rollback = await asyncio.to_thread(up.json, "rollback", "--reason", "a test")
            assert rollback["traffic"]["new_share"] == 0.0
            assert (await client.call("GetProduct")).name == "Tea"
            assert len(old.live_calls) == before + 1
