"""The proxies of deploy/, started on loopback with the files of that folder."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.mailserver import certificate
from bench.servers import ROOT

FILES = {"nginx": "users.conf", "haproxy": "users.cfg", "caddy": "Caddyfile"}
STOP = {"nginx": signal.SIGQUIT, "haproxy": signal.SIGUSR1, "caddy": signal.SIGTERM}
# Paths that need no root; otherwise, the defaults of nginx hold.
NGINX = """
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/users.conf;
}}
"""


def configuration(name: str, folder: Path, ports: list[int], port: int) -> list[str]:
    """Write the file of a proxy to `folder`, and return the command that starts the proxy.

    Addresses, ports and certificates are replaced. Raises RuntimeError if the file has none.
    """
    certificate_file, key_file = certificate()
    both = folder / "both.pem"
    both.write_text(Path(certificate_file).read_text() + Path(key_file).read_text())
    text = (ROOT / "deploy" / name / FILES[name]).read_text()
    replaced = {
        "127.0.0.1:5001": f"127.0.0.1:{ports[0]}",
        "127.0.0.1:5002": f"127.0.0.1:{ports[1]}",
        **{
            "nginx": {
                "    listen 80;\n    listen [::]:80;\n": "",
                "    listen [::]:443 ssl;\n": "",
                "listen 443": f"listen 127.0.0.1:{port}",
                "/etc/ssl/users.pem": certificate_file,
                "/etc/ssl/users.key": key_file,
            },
            "haproxy": {
                "bind :::443 v4v6": f"bind 127.0.0.1:{port}",
                "/etc/haproxy/users.pem": str(both),
                # This needs root.
                "    user haproxy\n    group haproxy\n    chroot /var/lib/haproxy\n": "",
            },
            "caddy": {
                "{$SITE:users.example.com} {": "{\n\tadmin off\n\tauto_https disable_redirects\n}\n"
                f"https://127.0.0.1:{port} {{\n\ttls {certificate_file} {key_file}"
            },
        }[name],
    }
    for old, new in replaced.items():
        if old not in text:
            raise RuntimeError(f"deploy/{name}/{FILES[name]} does not contain {old!r}")
        text = text.replace(old, new)
    file = folder / FILES[name]
    file.write_text(text)
    # Caddy is a package of the virtual environment; Debian's is too old for its file.
    program = Path(sys.prefix, "bin", name) if name == "caddy" else Path("/usr/sbin", name)
    if name == "nginx":
        main = folder / "nginx.conf"
        main.write_text(NGINX.format(folder=folder))
        return [str(program), "-c", str(main), "-p", str(folder), "-g", "daemon off;"]
    if name == "haproxy":
        return [str(program), "-db", "-f", str(file)]
    return [str(program), "run", "--config", str(file), "--adapter", "caddyfile"]


@contextlib.contextmanager
def proxy(name: str, folder: Path, ports: list[int]) -> Iterator[int]:
    """Run a proxy in front of two servers, and yield its port.

    It speaks TLS with a certificate that this process and its children accept from now on.
    """
    (port,) = free_ports(1)
    command = configuration(name, folder, ports, port)
    os.environ["SSL_CERT_FILE"] = certificate()[0]
    with (folder / f"{name}.log").open("wb") as log:
        environment = {**os.environ, "HOME": str(folder)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        await_port(process, port)
        yield port
    finally:
        process.send_signal(STOP[name])
        process.wait(30)


def await_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when a process listens; raise RuntimeError if it exits or takes 90 seconds."""
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"no process listens on {port}")


def free_ports(count: int) -> list[int]:
    """Return unused ports of 127.0.0.1."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]
