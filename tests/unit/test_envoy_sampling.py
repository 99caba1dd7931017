from __future__ import annotations

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from abreast_sidecar.cli.serve import envoy_command
from abreast_sidecar.envoy.render import render_config, validate_config
from abreast_sidecar.envoy.sampling import SampleRule, parse_rules
from abreast_sidecar.envoy.settings import EnvoySettings
from abreast_sidecar.errors import SettingError

EXAMPLES = (
    "POST /search read-only 100%; /admin/* 0%; /healthz 0%; * header:x-canary=1 50%; GET /users/{id} host:*.shop.com 5%;"
    " name:api POST /graphql queries 0.25; POST,PUT /orders header:x-a=1 header:x-b 1%"
)
segments = st.sampled_from(["/", "a", "b", "*", "{x}"])
paths = st.lists(segments, max_size=6).map(lambda parts: "/" + "".join(parts))


def test_rule_has_the_parts_of_its_words() -> None:
    search, admin, _, canary, users, api, orders = parse_rules(EXAMPLES)

    assert search == SampleRule("post-search", 1.0, ("POST",), "/search", read_only=True)
    assert admin == SampleRule("admin", 0.0, path="/admin/*")
    assert canary == SampleRule("x-canary-1", 0.5, headers=(("x-canary", "1"),))
    assert users == SampleRule("get-users-id-shop-com", 0.05, ("GET",), "/users/{id}", "*.shop.com")
    assert api == SampleRule("api", 0.25, ("POST",), "/graphql", read_only=True, queries=True)
    assert orders.headers == (("x-a", "1"), ("x-b", ""))


def test_rule_is_the_same_as_text_and_as_mapping() -> None:
    rules = parse_rules(EXAMPLES)

    assert parse_rules("\n".join(map(str, rules))) == rules
    assert parse_rules([rule.to_mapping() for rule in rules]) == rules
    assert parse_rules([{"method": "post, put", "path": "/x", "share": "10%"}])[0].methods == ("POST", "PUT")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("POST /search", "a share is missing"),
        ("POST /search 101%", "a share such as 25%"),
        ("POST /search -1%", "'-1%' is not part of a rule"),
        ("POST /search 10% 20%", "more than one share"),
        ("POST /search 10", "a share such as 25%"),
        ("post /search 10%", "'post' is not part of a rule"),
        ("search 10%", "'search' is not part of a rule"),
        ("POST, /search 10%", "methods must be words"),
        ("/a?b 10%", "a path must be like"),
        ("/{a-b} 10%", "a path must be like"),
        ("/x host:shop.com:80 10%", "without a port"),
        ("/x header:a\x7fb=1 10%", "a header must be like"),
        ("/x header:x-abreast-role=live 10%", "x-abreast-role can't be matched"),
        ("10%", "--sample-safe"),
        ("* 10%", "--sample-safe"),
        ("/x queries 10%", "needs the method POST"),
        ("GET /x queries 10%", "needs the method POST"),
        ("GET /x read-only 10%", "read-only needs a method"),
        ("/x read-only 10%", "read-only needs a method"),
        ("name:UP /x 10%", "a name has at most"),
        ("name:a /x 10%; name:a /y 10%", "has the name a too"),
        ("POST /x 10%; POST /x 20%", "matches the same requests with the share 10%"),
        ("POST /x queries 10%; POST /x 20%", "matches the same requests with the share 10%"),
        ("/admin/* 10%; GET /admin/users/{id} 20%", "it can never match, because the earlier rule '/admin/\\*'"),
        ("header:x-a 10%; POST /x header:x-a=1 20%", "it can never match"),
        ("/x host:*.a.com 10%; /x host:b.a.com 20%", "it can never match"),
        ("; ".join(f"/{number} 1%" for number in range(51)), "at most 50 rules"),
    ],
)
def test_rule_that_is_wrong_is_refused(text: str, problem: str) -> None:
    with pytest.raises(SettingError, match=problem):
        EnvoySettings.from_environment({"ABREAST_SAMPLE": text})


def test_unknown_field_of_a_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown field `methods`"):
        parse_rules([{"methods": "POST", "path": "/x", "share": 1}])


def test_narrower_rule_may_come_first() -> None:
    rules = (
        "/admin/users 10%; /admin/{x} 10%; /admin/* 10%; POST host:a.com 1%; host:a.com 1%; /x header:x-a=1 1%; /x 1%"
    )

    assert len(parse_rules(rules)) == 7


@given(paths, paths)
def test_rule_includes_only_rules_whose_requests_it_matches(path: str, other: str) -> None:
    """Each wildcard of the other rule stands for a text that only a wildcard can match."""
    rule, narrower = SampleRule("a", 1.0, path=path), SampleRule("b", 1.0, path=other)
    if rule.includes(narrower):
        for text in ("", "q", "/", "q/a"):
            request = SampleRule("c", 1.0, path=other.replace("*", text).replace("{x}", "q"))
            assert rule.includes(request)


def test_option_can_be_used_several_times() -> None:
    words = ["render", "--sample", "POST /search 100%", "--sample", "/admin/* 0%", "--no-validate"]
    result = CliRunner().invoke(envoy_command, words)

    assert result.exit_code == 0
    assert "# Rule post-search: POST /search\n" in result.stdout
    assert "# Rule admin: /admin/*\n" in result.stdout


def test_unsafe_methods_are_mirrored_only_by_a_rule_that_names_them() -> None:
    text = render_config(EnvoySettings(sample=parse_rules("/any 100%; POST,GET /named 100%")))

    assert "rule_any_unsafe_sampled" not in text
    assert "rule_any_unsafe_plain" in text
    assert "rule_post-get-named_unsafe_sampled" in text


def test_envoy_accepts_rules_and_has_no_script_for_them_without_graphql() -> None:
    validate_config(render_config(EnvoySettings(sample=parse_rules(EXAMPLES), tester_secret="0123456789abcdef")))

    assert "is_graphql_query(headers" not in render_config(EnvoySettings(sample=parse_rules("/x 1%")))
