"""What an agent must be told before it starts: one JSON or TOML file, checked with errors that name the key."""

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

#: sun_path holds 108 bytes with its terminator (unix(7)).
SOCKET_PATH_LIMIT = 107


class ConfigError(ValueError):
    """The configuration cannot be used; the message is one line that names the key and what it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """An agent's settings.

    `node` names the node for the controller, `spare` marks it as one that holds no rank while all is well.
    `controller` and `ray_address` are host:port; `node_ip` is the address of its raylet and of the peer service.
    `runtime` (socket, slots) is best in /dev/shm and is cleared at every start; `state` (outbox, action history) lasts.
    `trace` takes spans when there is no `otlp_endpoint`. `gang_command` replaces the gang child's command.
    """

    node: str
    controller: str
    node_ip: str
    ray_address: str
    runtime: Path
    state: Path
    logs: Path
    spare: bool = False
    trace: Path | None = None
    otlp_endpoint: str | None = None
    peer_port: int = 0
    device_uuid: str = ""
    device_serial: str = ""
    device_kind: str = "cpu"
    gang_command: tuple[str, ...] = ()

    @property
    def socket(self) -> Path:
        """The Unix socket on which workers and the gang child report."""
        return self.runtime / "sock"

    @property
    def slots(self) -> Path:
        """The folder of the state slots."""
        return self.runtime / "slots"

    @property
    def device(self) -> str:
        """The accelerator's uuid; a node without one of its own is its own device."""
        return self.device_uuid or f"{self.device_kind}-{self.node}"


_PATHS = ("runtime", "state", "logs", "trace")
_ENDPOINTS = ("controller", "ray_address")
_REQUIRED = ("node", "controller", "node_ip", "ray_address", "runtime", "state", "logs")


def load(path: Path) -> AgentConfig:
    """Read an agent's configuration from a .json or .toml file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # of either format, or text that is not UTF-8
        raise ConfigError(f"{path} is not valid {path.suffix.lstrip('.') or 'json'}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold one object of settings")
    return parse(document)


def parse(document: dict[str, Any]) -> AgentConfig:
    """Check a document of settings and make it an AgentConfig. Raises ConfigError."""
    known = {field.name for field in fields(AgentConfig)}
    unknown = sorted(set(document) - known)
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    for key in _REQUIRED:
        if key not in document:
            raise ConfigError(f"{key} is missing")
    values = {key: _value(key, value) for key, value in document.items()}
    config = AgentConfig(**values)
    if len(bytes(config.socket)) > SOCKET_PATH_LIMIT:
        raise ConfigError(
            f"runtime is too long: {config.socket} exceeds {SOCKET_PATH_LIMIT} bytes, the limit of a socket"
        )
    return config


def _value(key: str, value: Any) -> Any:
    """Check one setting and give it its type."""
    if key in ("trace", "otlp_endpoint") and value is None:
        return None
    if key == "spare":
        return _typed(key, value, bool, "true or false")
    if key == "peer_port":
        return _port(key, value, lowest=0)
    if key == "gang_command":
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise ConfigError("gang_command must be a list of strings")
        return tuple(value)
    text = _typed(key, value, str, "a string")
    if not text and not key.startswith("device_"):
        raise ConfigError(f"{key} must not be empty")
    if key in _ENDPOINTS:
        _endpoint(key, text)
    if key == "node":
        _name(text)
    return _path(key, text) if key in _PATHS else text


def _typed(key: str, value: Any, kind: type, wanted: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{key} must be {wanted}, not {value!r}")
    return value


def _endpoint(key: str, text: str) -> None:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{key} must be host:port, not {text!r}")
    _port(key, int(port), lowest=1)


def _port(key: str, value: Any, lowest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= 65535:
        raise ConfigError(f"{key} must be a port between {lowest} and 65535, not {value!r}")
    return value


def _name(text: str) -> None:
    """A node's name becomes part of file names and of log lines."""
    if len(text) > 63 or not all(c.isascii() and (c.isalnum() or c in "-._") for c in text) or text.startswith("."):
        raise ConfigError(f"node must be at most 63 letters, digits, '-', '_' or '.', not {text!r}")


def _path(key: str, text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or path == Path("/"):
        raise ConfigError(f"{key} must be an absolute path below the root, not {text!r}")
    return path
