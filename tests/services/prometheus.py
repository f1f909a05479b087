"""A real Prometheus on a free port, scraping what a test serves. Debian's package `prometheus` has it, and promtool."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from launching import free_port
from services.required import skip_or_fail


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        skip_or_fail(f"{program} is not installed (apt-get install prometheus)")
    return str(path)


class Prometheus:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self._process, self._port, self._log = process, port, log

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of the answer, or None while it does not listen yet."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?" + urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]
        except OSError:
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            return None

    def query(self, expression: str) -> list[dict[str, Any]]:
        data = self.get("query", query=expression)
        return [] if data is None else data["result"]

    def wait_for(self, expression: str, *, seconds: float = 30) -> list[dict[str, Any]]:
        """Until something answers it."""
        self.wait_until(lambda: bool(self.query(expression)), seconds=seconds)
        return self.query(expression)

    def wait_until(
        self, condition: Callable[[], bool], *, seconds: float, missing: Callable[[], object] = str
    ) -> None:
        """`missing` tells what is still waited for when the time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"what the test waits for did not happen in time {missing()}"
            time.sleep(0.1)


@contextmanager
def scraping(folder: Path, targets: Sequence[str], *, rules: Path | None = None) -> Iterator[Prometheus]:
    """A server in `folder` that scrapes host:port each five times a second."""
    program, port, log = need("prometheus"), free_port(), folder / "prometheus.log"
    config = folder / "prometheus.yml"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {
                    "scrape_interval": "200ms",
                    "scrape_timeout": "200ms",
                    "evaluation_interval": "500ms",
                },
                "scrape_configs": [{"job_name": "pretrain", "static_configs": [{"targets": list(targets)}]}],
                "rule_files": [str(rules)] if rules else [],
            }
        )
    )
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=file,
            stderr=file,
        )
    try:
        yield Prometheus(process, port, log)
    finally:
        process.terminate()
        process.wait(timeout=30)
