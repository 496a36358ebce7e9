"""The configuration of the proxy before a SuperLink: from outside, nodes' own calls and nothing else.

Flower serves everything at one port, and asks nobody who submits code there or registers a key for a password. So the
SuperLink listens on the loopback, and nginx lets ten paths through by name.
"""

from __future__ import annotations

from pathlib import Path

from sordino.errors import ConfigError
from sordino.flower.names import FLEET, HEALTH

CONFIGURATION = """\
# Written by 'sordino flower up'; it is written anew at every start.
daemon off;
worker_processes 1;
pid {nginx_pid};
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  server_tokens off;
  client_body_temp_path {nginx_body};
  proxy_temp_path {nginx_proxy};
  fastcgi_temp_path {nginx_unused};
  uwsgi_temp_path {nginx_unused};
  scgi_temp_path {nginx_unused};
  limit_conn_zone $binary_remote_addr zone=sites:1m;

  upstream superlink {{
    server 127.0.0.1:{loopback};
    keepalive 16;
  }}
  server {{
    listen {address}:{port} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    ssl_protocols TLSv1.2 TLSv1.3;
    limit_conn sites 64;
    client_max_body_size {most_bytes};
    client_header_timeout 20s;
    client_body_timeout 60s;
    keepalive_timeout 75s;

    # Bodies go through as they come: nothing of a site is kept in files here.
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_set_header Host localhost;
    proxy_connect_timeout 10s;
    proxy_read_timeout 120s;
    proxy_ssl_verify on;
    proxy_ssl_trusted_certificate {ca};
    proxy_ssl_name localhost;

{paths}
    location / {{ return 403; }}
  }}
}}
"""

PATH = """\
    location = {path} {{ limit_except {method} {{ deny all; }} proxy_pass https://superlink{path}; }}
"""


def configuration(
    state: Path, address: str, port: int, loopback: int, certificate: Path, key: Path, ca: Path, most_bytes: int
) -> str:
    """Return nginx's configuration.

    Args:
        state: the project's folder.
        address: of this machine, at which sites connect.
        port: at which sites connect.
        loopback: the SuperLink's port.
        certificate: chain to show to sites.
        key: its private key.
        ca: signed the SuperLink's certificate.
        most_bytes: the longest request.
    """
    methods = {HEALTH: "GET", **dict.fromkeys(FLEET, "POST")}
    return CONFIGURATION.format(
        nginx_pid=_quoted(state / "nginx.pid"),
        nginx_body=_quoted(state / "nginx-body"),
        nginx_proxy=_quoted(state / "nginx-proxy"),
        nginx_unused=_quoted(state / "nginx-unused"),
        address=f"[{address}]" if ":" in address else address,
        port=port,
        loopback=loopback,
        certificate=_quoted(certificate),
        key=_quoted(key),
        ca=_quoted(ca),
        most_bytes=most_bytes,
        paths="".join(PATH.format(path=path, method=method) for path, method in methods.items()),
    )


def _quoted(path: Path) -> str:
    """Return a path for the configuration.

    Raises:
        ConfigError: it holds what the configuration cannot name.
    """
    text = str(path)
    if any(letter in text for letter in '$"\\\n'):
        raise ConfigError("server.state", text, "nginx takes no path with $, a quote or a backslash; choose another")
    return f'"{text}"'
