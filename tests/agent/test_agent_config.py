"""A configuration is either usable or refused with the key that is wrong."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import ConfigError, load, parse
from agent.identity import next_epoch

GOOD: dict[str, Any] = {
    "node": "n0",
    "controller": "127.0.0.1:5000",
    "node_ip": "127.0.0.2",
    "ray_address": "127.0.0.1:6379",
    "runtime": "/dev/shm/assay-x/n0",
    "state": "/var/lib/assay",
    "logs": "/var/log/assay",
}


def test_json_and_toml_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({**GOOD, "spare": True, "gang_command": ["x"]}))
    lines = [f"{key} = {json.dumps(value)}" for key, value in GOOD.items()]
    (tmp_path / "a.toml").write_text("\n".join([*lines, "spare = true", 'gang_command = ["x"]']))
    config = load(tmp_path / "a.json")
    assert config == load(tmp_path / "a.toml")
    assert config.socket == Path("/dev/shm/assay-x/n0/sock")
    assert (config.spare, config.gang_command, config.device) == (True, ("x",), "cpu-n0")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("node", "", "node must not be empty"),
        ("node", "a/b", "node must be at most 63"),
        ("node", "..", "node must be at most 63"),
        ("controller", "localhost", "controller must be host:port"),
        ("controller", "h:0", "controller must be a port"),
        ("ray_address", "h:70000", "ray_address must be a port"),
        ("runtime", "relative", "runtime must be an absolute path"),
        ("runtime", "/", "runtime must be an absolute path"),
        ("runtime", "/" + "x" * 110, "runtime is too long"),
        ("spare", "yes", "spare must be true or false"),
        ("peer_port", True, "peer_port must be a port"),
        ("gang_command", "sh", "gang_command must be a list"),
        ("nodes", 1, "unknown setting 'nodes'"),
    ],
)
def test_what_is_wrong_is_named(key: str, value: Any, message: str) -> None:
    parse(GOOD)
    with pytest.raises(ConfigError, match=message):
        parse({**GOOD, key: value})


@pytest.mark.parametrize("key", sorted(GOOD))
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.toml", "= 3"), ("a.json", "[]"), ("a.json", "\udcff")])
def test_files_that_cannot_be_read_are_errors(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError):
        load(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.json")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))


@given(st.dictionaries(st.sampled_from([*GOOD, "spare", "peer_port", "gang_command", "trace"]), JSON))
def test_any_document_is_a_configuration_or_a_config_error(document: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        assert parse({**GOOD, **document}).node


def test_epochs_grow_even_when_the_clock_was_set_back_or_the_folder_lost(tmp_path: Path) -> None:
    first, second = next_epoch(tmp_path), next_epoch(tmp_path)
    assert second > first
    (tmp_path / "epoch").write_text(str(2**52))
    assert next_epoch(tmp_path) == 2**52 + 1
    (tmp_path / "epoch").write_text("torn")
    assert next_epoch(tmp_path) > second
