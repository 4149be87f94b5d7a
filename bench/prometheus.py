"""Show that the alerts and the dashboard find their metrics: python -m bench.prometheus --help.

Prometheus runs with the files of deploy/prometheus/ and scrapes a server under load. Each query of
the dashboard has to return values, and each rule has to be evaluated without an error. Each
selector of a rule has to match a series; only its `status` and its codes of failures are left out,
because the server answers neither 500 nor 503.
"""

import argparse
import contextlib
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from sqlalchemy import URL, make_url

from bench.proxies import await_port, free_ports
from bench.report import add_database_url, exit_on_sigterm, machine, say
from bench.rolling import Server
from bench.servers import JSON, PASSWORD, ROOT, database, new_user, url_text

FILES = ROOT / "deploy" / "prometheus"
SELECTOR = re.compile(r'\b((?:users|process)_\w+|up)\b(\{(?:[^"{}]|"[^"]*")*\})?')
VARIABLES = {"$__rate_interval": "10s", "$job": "users", "$instance": ".*"}  # Grafana's


def visit(origin: str) -> None:
    """Register, get the status, reuse a refresh token, and fail to log in."""
    user = new_user()
    pair = send(f"{origin}/auth/register", user)
    send(f"{origin}/auth/status", token=pair["auth_token"])
    for _ in range(2):
        send(f"{origin}/auth/refresh", {"refresh_token": pair["refresh_token"]})
    credentials = {"email": user["email"], "password": PASSWORD}
    send(f"{origin}/auth/login", credentials)
    send(f"{origin}/auth/login", credentials | {"password": "wrong"})
    send(f"{origin}/auth/password/forgot", {"email": user["email"]})
    send(f"{origin}/health/ready")


def send(url: str, body: object = None, token: str = "") -> Any:
    """Return the JSON of a response, whatever its status."""
    headers = JSON | ({"Authorization": f"Bearer {token}"} if token else {})
    request = Request(url, json.dumps(body).encode() if body else None, headers)  # noqa: S310  # http
    try:
        with urlopen(request, timeout=30) as answer:  # noqa: S310  # an http URL
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


@contextlib.contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[str]:
    """Run Prometheus with the shipped files, every second; yield the URL of its API."""
    (port,) = free_ports(1)
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    file = folder / "prometheus.yml"
    text = file.read_text().replace(
        '"127.0.0.1:9461", "127.0.0.1:9462"', f'"127.0.0.1:{metrics_port}"'
    )
    file.write_text(text.replace("_interval: 15s", "_interval: 1s"))
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
        )
    try:
        await_port(process, port)
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        process.terminate()
        process.wait(30)


def queries() -> Iterator[tuple[str, str]]:
    """Yield the title of each panel of the dashboard, and each of its queries."""
    for panel in json.loads((FILES / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def selectors(expression: str) -> set[str]:
    """Return the selectors of a query, without `status` and `code`."""
    found = SELECTOR.findall(expression)
    failure = r'(?:status|code)(=~|!~|=|!=)"[^"]*",? ?'
    return {name + re.sub(failure, "", labels) for name, labels in found}


def faults(api: str) -> Iterator[str]:
    """Yield a line for each query without a result, and for each rule that cannot be evaluated."""
    for title, expression in queries():
        answer = send(f"{api}/query?{urlencode({'query': expression})}")
        values = [float(each["value"][1]) for each in answer.get("data", {}).get("result", [])]
        if not any(value == value for value in values):  # NaN is no value
            yield f"dashboard, {title}: {answer.get('error', 'no value')}: {expression}"
    for group in send(f"{api}/rules")["data"]["groups"]:
        for rule in group["rules"]:
            if rule["health"] != "ok":
                yield f"{rule['name']}: {rule['health']} {rule.get('lastError')}"
            for selector in sorted(selectors(rule["query"])):
                answer = send(f"{api}/series?{urlencode({'match[]': selector})}")
                if not answer.get("data"):
                    yield f"{rule['name']}: {answer.get('error', 'no series')}: {selector}"


def report(server_url: URL, seconds: float) -> tuple[str, list[str]]:
    """Return what was tried, and the faults."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port, metrics_port = free_ports(2)
        settings = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url_text(stack.enter_context(database(server_url))),
            "SECRET_KEY": secrets.token_hex(32),
            "BCRYPT_LOG_ROUNDS": "4",
            "RATE_LIMITS": "false",
            "REFRESH_REUSE_SECONDS": "0",
            "SMTP_URL": "smtp://127.0.0.1:1",
            "MAIL_FROM": "users@example.com",
            "MAIL_SENDER": "false",
            "LINK_BASE_URL": "https://example.com",
            "METRICS_PORT": str(metrics_port),
            "GRANIAN_HOST": "127.0.0.1",
        }
        server = Server(port, settings, folder / "server.log")
        stack.callback(server.stop)
        server.start()
        api = stack.enter_context(prometheus(folder / "prometheus", metrics_port))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            visit(f"http://127.0.0.1:{port}")
        found = list(faults(api))
        rules = sum(len(group["rules"]) for group in send(f"{api}/rules")["data"]["groups"])
    lines = [machine(server_url), "", "| | tried |", "|---|---|"]
    lines += [f"| queries of the dashboard | {len(list(queries()))} |", f"| alerts | {rules} |"]
    return "\n".join(lines), found


def main() -> int:
    """Print what was tried; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.prometheus", description=__doc__)
    add_database_url(parser)
    parser.add_argument("--seconds", type=float, default=15.0, help="under load")
    options = parser.parse_args()
    exit_on_sigterm()
    table, found = report(make_url(options.database_url), options.seconds)
    for fault in found:
        say(fault)
    print(table)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
