"""Checks that doctor makes of the facts of each part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from abreast_sidecar.cli.doctor import Check, envoy, mask_password, servers, services
from abreast_sidecar.cli.doctor.run import check_clocks


def states(checks: Iterable[Check]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


UP = envoy.EndpointReachability("10.0.0.1:80")
DOWN = envoy.EndpointReachability("10.0.0.2:80", "connection refused")
UNSURE = envoy.EndpointReachability("10.0.0.3:80", "timed out", is_certain=False)


def envoy_facts(
    *, safe: float = 0.1, old: tuple[envoy.EndpointReachability, ...] = (UP,), **stats: int
) -> envoy.EnvoyFacts:
    healthy = {f"cluster.new.membership_{state}": 1 for state in ("healthy", "total")}
    counters = {
        "runtime.control_plane.connected_state": 1,
        "vhost.service.route.safe_sampled.upstream_rq_total": 10,
        "vhost.service.route.safe_plain.upstream_rq_total": 90,
        "cluster.new_shadow.lua.copy.sent": 10,
        "http.ingress.lua.copies.sampled.stream": 10,
    }
    overrides = {name.replace("__", "."): value for name, value in stats.items()}
    return envoy.EnvoyFacts(
        url="http://127.0.0.1:9901",
        version="1.40.0",
        service="shop",
        state="LIVE",
        stats={**healthy, **counters, **overrides},
        sampling={"safe": safe, "unsafe": 0.0},
        old_endpoints=old,
    )


def test_envoy_that_mirrors_passes() -> None:
    assert set(states(envoy.check_envoy(envoy_facts())).values()) == {"ok"}


@pytest.mark.parametrize(
    ("facts", "name", "state"),
    [
        (envoy_facts(safe=0.0), "sampling", "fail"),
        (envoy_facts(cluster__new__membership_healthy=0), "new", "fail"),
        (envoy_facts(cluster__new__membership_total=2), "new", "warn"),
        (envoy_facts(old=(DOWN,)), "old", "fail"),
        (envoy_facts(old=(UP, DOWN)), "old", "warn"),
        (envoy_facts(old=(UNSURE,)), "old", "warn"),
        (envoy_facts(old=()), "old", "fail"),
        (envoy_facts(runtime__admin_overrides_active=1), "override", "warn"),
        (envoy_facts(cluster__new_shadow__upstream_rq_pending_failure_eject=3), "copies", "warn"),
        (envoy_facts(runtime__control_plane__connected_state=0), "control", "fail"),
        (envoy_facts(cluster__new_shadow__upstream_rq_pending_overflow=3), "copies", "warn"),
        (envoy_facts(http__ingress__lua__copies__too_large=3), "copies", "warn"),
        (envoy_facts(http__ingress__lua__copies__over_memory=3), "copies", "warn"),
        (envoy_facts(http__ingress__lua__copies__connection_logins=1), "logins", "fail"),
    ],
)
def test_envoy_problem_is_reported(facts: envoy.EnvoyFacts, name: str, state: str) -> None:
    assert states(envoy.check_envoy(facts))[name] == state


def test_sampling_by_rules_alone_passes() -> None:
    facts = replace(envoy_facts(safe=0.0), rule_sampling={"api": 0.5, "admin": 0.0})
    (check,) = (check for check in envoy.check_envoy(facts) if check.name == "sampling")

    assert states([check]) == {"sampling": "ok"}
    assert check.found.endswith("are mirrored; by rules: admin 0%, api 50%")


def test_mirrored_requests_exclude_retries() -> None:
    facts = envoy_facts(
        vhost__service__route__safe_sampled__upstream_rq_total=20,
        cluster__new_shadow__upstream_rq_total=7,
        cluster__old_shadow__upstream_rq_total=2,
        cluster__old_shadow__upstream_cx_none_healthy=1,
        cluster__old_baseline__upstream_rq_total=5,
    )

    assert facts.mirrored_requests == 10
    assert (
        "100 requests, 10 of them mirrored" in next(c for c in envoy.check_envoy(facts) if c.name == "requests").found
    )


def hosts(cluster: str, *, ejected: bool = False, **stats: int) -> dict[str, Any]:
    """Return a cluster as Envoy's /clusters writes it: numbers are strings, and zeros are omitted."""
    host: dict[str, Any] = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 8001}},
        "stats": [{"name": name, **({"value": str(n)} if n else {})} for name, n in stats.items()],
        "health_status": {"eds_health_status": "HEALTHY", **({"failed_outlier_check": True} if ejected else {})},
    }
    return {"name": cluster, "host_statuses": [host]}


def test_count_connections_sums_clusters_of_old() -> None:
    clusters = [
        hosts("old", cx_connect_fail=2, cx_active=0, rq_success=5, rq_total=9),
        hosts("old_shadow", cx_connect_fail=1, ejected=True),
        hosts("new", cx_connect_fail=8),
    ]

    assert envoy.count_connections({"cluster_statuses": clusters}) == {
        ("127.0.0.1", 8001): envoy.ConnectionCounts(
            failed_connects=3, active_connections=0, successful_requests=5, is_ejected=True
        )
    }


REFUSED = "connection refused"


@pytest.mark.parametrize(
    ("host", "connect_error", "after", "is_local", "is_reached", "is_certain"),
    [
        ("127.0.0.1", "", envoy.ConnectionCounts(failed_connects=1), True, True, True),
        ("127.0.0.1", "", envoy.ConnectionCounts(failed_connects=2), True, False, True),
        ("127.0.0.1", "", envoy.ConnectionCounts(failed_connects=1, is_ejected=True), True, False, True),
        ("10.0.0.1", "timed out", envoy.ConnectionCounts(failed_connects=1, successful_requests=1), False, True, True),
        ("10.0.0.1", "timed out", envoy.ConnectionCounts(failed_connects=1), False, False, True),
    ],
)
def test_judge_reachability_prefers_envoys_counters(
    host: str, connect_error: str, after: envoy.ConnectionCounts, is_local: bool, is_reached: bool, is_certain: bool
) -> None:
    reachability = envoy.judge_reachability(
        (host, 8001), connect_error, envoy.ConnectionCounts(failed_connects=1), after, is_local_envoy=is_local
    )

    assert (not reachability.problem, reachability.is_certain) == (is_reached, is_certain)


@pytest.mark.parametrize(
    ("host", "connect_error", "is_local", "is_certain"),
    [
        ("127.0.0.1", REFUSED, True, True),
        ("127.0.0.1", REFUSED, False, False),
        ("10.0.0.1", REFUSED, True, True),
        ("10.0.0.1", "timed out", True, False),
    ],
)
def test_judge_reachability_without_traffic_uses_own_connection(
    host: str, connect_error: str, is_local: bool, is_certain: bool
) -> None:
    idle = envoy.ConnectionCounts()

    assert envoy.judge_reachability(
        (host, 8001), connect_error, idle, idle, is_local_envoy=is_local
    ) == envoy.EndpointReachability(f"{host}:8001", connect_error, is_certain=is_certain)


def test_requests_check_distinguishes_unsafe_methods_from_no_request() -> None:
    none = envoy_facts(
        http__ingress__lua__copies__sampled__stream=0,
        cluster__new_shadow__upstream_rq_total=0,
        vhost__service__route__safe_plain__upstream_rq_total=0,
    )
    posts = envoy_facts(
        http__ingress__lua__copies__sampled__stream=0,
        cluster__new_shadow__upstream_rq_total=0,
        vhost__service__route__safe_plain__upstream_rq_total=0,
        vhost__service__route__unsafe_plain__upstream_rq_total=5,
    )
    observations = [next(c for c in envoy.check_envoy(facts) if c.name == "requests").found for facts in (none, posts)]

    assert "no request has passed through Envoy" in observations[0]
    assert "all have unsafe methods" in observations[1]


def process(**report: Any) -> services.ServiceProcess:
    return services.ServiceProcess.from_report({"host": "a", "pid": 1, "seen": 99.0, **report}, server_time_s=100.0)


def test_services_pass_if_both_versions_capture() -> None:
    processes = [process(versions={"old": 5}, release="1.4"), process(versions={"new": 5})]
    checks = list(services.check_services("shop", processes, 5, []))

    assert set(states(checks).values()) == {"ok"}
    assert "release 1.4" in next(c for c in checks if c.name == "old").found


def test_processes_with_different_keys_warn() -> None:
    old, new = (process(versions={name: 5}, redaction_key=f"key-{name}") for name in ("old", "new"))

    assert states(services.check_services("shop", [old, new], 5, []))["keys"] == "warn"
    assert "keys" not in states(services.check_services("shop", [old, old], 5, []))


def test_version_without_middleware_fails() -> None:
    checks = states(services.check_services("shop", [process(versions={"old": 5})], 5, []))

    assert (checks["old"], checks["new"]) == ("ok", "fail")


def test_version_with_captures_off_warns() -> None:
    checks = list(services.check_services("shop", [process(versions={"old": 5})], 5, [], ["new"]))
    (old, new) = services.check_services("shop", [], 5, [], ["old", "new"])

    assert states(checks)["new"] == old.state == new.state == "warn"
    assert (
        next(c for c in checks if c.name == "new").found == new.found == "captures of new are off (ABREAST_NEW_CAPTURE)"
    )
    assert states(services.check_services("shop", [], 5, [], ["new"]))["middleware"] == "fail"  # nothing captures old


def test_join_warns_of_pairs_without_a_version_with_captures_off() -> None:
    shard = servers.ShardState({"received": 5, "timed_out": 5}, waiting_pairs=0, ready_pairs=0)
    states_by_off = [
        states(servers.check_join(redis_facts(shards={"shop": [shard]}), "shop", 5, off)) for off in ([], ["new"])
    ]

    assert [checks["pairs"] for checks in states_by_off] == ["fail", "warn"]


def test_versions_without_captures_warn_while_nothing_is_mirrored() -> None:
    checks = states(services.check_services("shop", [process(versions={})], 0, []))

    assert (checks["old"], checks["new"]) == ("warn", "warn")


def test_middleware_check_names_other_services() -> None:
    (check,) = services.check_services("shop", [], 5, ["shopp"])

    assert check.state == "fail"
    assert "but of shopp" in check.found


def test_middleware_check_fails_if_all_processes_are_silent() -> None:
    silent = services.ServiceProcess.from_report({"seen": 1.0, "versions": {"old": 1, "new": 1}}, server_time_s=100.0)

    assert states(services.check_services("shop", [silent], 1, []))["middleware"] == "fail"


def silent(version: str) -> services.ServiceProcess:
    return services.ServiceProcess.from_report({"seen": 60.0, "versions": {version: 9}}, server_time_s=100.0)


def test_version_whose_processes_are_silent_fails() -> None:
    checks = {c.name: c for c in services.check_services("shop", [process(versions={"old": 5}), silent("new")], 5, [])}

    assert (checks["old"].state, checks["new"].state) == ("ok", "fail")
    assert checks["new"].found == "no process of new has reported for 40 s"


@pytest.mark.parametrize(("fresh", "mirrored"), [([process(versions={})], 5), ([], 0)])
def test_silent_version_warns_if_it_may_have_restarted(fresh: list[services.ServiceProcess], mirrored: int) -> None:
    processes = [process(versions={"old": 5}), silent("new"), *fresh]

    assert states(services.check_services("shop", processes, mirrored, []))["new"] == "warn"


def test_restarted_version_passes() -> None:
    processes = [process(versions={"old": 5}), silent("new"), process(versions={"new": 1})]

    assert states(services.check_services("shop", processes, 5, []))["new"] == "ok"


def test_drops_are_summed_by_reason() -> None:
    checks = services.check_services(
        "shop", [process(dropped={"queue_bytes": 2}), process(dropped={"queue_bytes": 3})], 5, []
    )

    assert "queue_bytes 5" in next(c for c in checks if c.name == "drops").found


def redis_facts(**changed: Any) -> servers.RedisFacts:
    shard = servers.ShardState(
        {"received": 20, "joined": 10, "timed_out": 0, "bytes": 100}, waiting_pairs=0, ready_pairs=0
    )
    facts: dict[str, Any] = {
        "url": "redis://127.0.0.1:6379/0",
        "info": {"redis_version": "7.0.15", "used_memory": 1000, "aof_enabled": 1},
        "server_time_s": 100.0,
        "clock_offset_s": 0.0,
        "eviction_policy": "noeviction",
        "shards": {"shop": [shard]},
        "reports": {"shop": []},
    }
    return servers.RedisFacts(**{**facts, **changed})


def test_redis_and_join_pass() -> None:
    assert set(states(servers.check_redis(redis_facts())).values()) == {"ok"}
    assert set(states(servers.check_join(redis_facts(), "shop", 10)).values()) == {"ok"}


@pytest.mark.parametrize(
    ("changed", "name", "state"),
    [
        ({"eviction_policy": "allkeys-lru"}, "eviction", "warn"),
        ({"eviction_policy": None}, "eviction", "warn"),
        ({"shards": {f"invented {number}": [] for number in range(501)}}, "services", "fail"),
        ({"info": {"redis_version": "6.2.1"}}, "version", "fail"),
        ({"info": {"redis_version": "7.2.4", "used_memory": 95, "maxmemory": 100}}, "memory", "fail"),
        ({"info": {"redis_version": "7.2.4", "aof_last_write_status": "err"}}, "persistence", "fail"),
    ],
)
def test_redis_problem_is_reported(changed: dict[str, Any], name: str, state: str) -> None:
    assert states(servers.check_redis(redis_facts(**changed)))[name] == state


@pytest.mark.parametrize(
    ("stats", "waiting", "ready", "name", "state"),
    [
        ({}, 0, 0, "captures", "fail"),
        ({"received": 10, "joined": 0, "timed_out": 10}, 0, 0, "pairs", "fail"),
        ({"received": 10, "joined": 8, "timed_out": 2}, 0, 0, "pairs", "warn"),
        ({"received": 10, "joined": 5, "rejected_pairs": 1}, 0, 0, "refused", "warn"),
        ({"received": 10, "joined": 5}, 0, 90_000, "queues", "warn"),
    ],
)
def test_join_problem_is_reported(stats: dict[str, int], waiting: int, ready: int, name: str, state: str) -> None:
    facts = redis_facts(shards={"shop": [servers.ShardState(stats, waiting, ready)]})

    assert states(servers.check_join(facts, "shop", 10))[name] == state


@pytest.mark.parametrize(("overdue", "state"), [(20.0, None), (31.0, "fail")])
def test_overdue_pairs_fail(overdue: float, state: str | None) -> None:
    shards = [servers.ShardState({"received": 20, "joined": 10}, waiting_pairs=1, ready_pairs=0, overdue_s=overdue)]

    assert states(servers.check_join(redis_facts(shards={"shop": shards}), "shop", 10)).get("sweep") == state


@pytest.mark.parametrize(("ready_s", "state"), [(29.0, "ok"), (31.0, "fail")])
def test_pair_that_waits_for_a_worker_fails(ready_s: float, state: str) -> None:
    shards = [servers.ShardState({"received": 20, "joined": 10}, waiting_pairs=0, ready_pairs=1, ready_s=ready_s)]

    assert states(servers.check_join(redis_facts(shards={"shop": shards}), "shop", 10))["queues"] == state


@pytest.mark.parametrize(
    ("sampled", "pairs", "state"), [(100, 90, None), (100, 110, None), (100, 111, "fail"), (10_000, 10_100, None)]
)
def test_more_pairs_than_sampled_requests_fail(sampled: int, pairs: int, state: str | None) -> None:
    facts = servers.PostgresFacts("postgresql://h/a", 180_006, "18.6", 0.0, 1000, 2, counts={"shop": (sampled, pairs)})

    assert states(servers.check_postgres(facts, 2)).get("surplus") == state


@pytest.mark.parametrize(("schema", "state"), [(0, "fail"), (1, "fail"), (2, "ok"), (3, "fail")])
def test_postgres_schema_must_match_the_code(schema: int, state: str) -> None:
    facts = servers.PostgresFacts("postgresql://h/a", 180_006, "18.6", 0.0, 1000, schema)

    assert states(servers.check_postgres(facts, 2))["schema"] == state


def test_postgres_fails_for_ledger_that_cannot_be_upgraded() -> None:
    facts = servers.PostgresFacts("postgresql://h/a", 180_006, "18.6", 0.0, 1000, outdated=True)

    assert states(servers.check_postgres(facts, 2))["schema"] == "fail"


def test_check_clocks_names_clock_with_offset() -> None:
    assert states(check_clocks({"Redis": 0.1, "Postgres": 0.2})) == {"agree": "ok"}
    assert states(check_clocks({"Redis": -30.0, "Postgres": 0.2})) == {"Redis": "warn"}


def test_mask_password_hides_passwords() -> None:
    assert mask_password("postgresql://u:secret@db:5432/abreast") == "postgresql://db:5432/abreast"
    assert "secret" not in mask_password("host=db password=secret")


def test_duplicate_node_ids_warn() -> None:
    (warning,) = services.check_duplicate_node_ids(["abreast", "edge-1", "abreast"])

    assert warning.state == "warn"
    assert "2 Envoys share the node id abreast" in warning.found
    assert "--service-node" in warning.advice
    assert not list(services.check_duplicate_node_ids(["abreast", "edge-1"]))
