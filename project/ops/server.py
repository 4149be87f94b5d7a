"""The server as in production: serve."""

import logging
import os
import sys
from pathlib import Path

from flask import current_app

from project.config import SERVICE_NAME, VERSION
from project.extensions import db
from project.lib import database, encryption, logs, metrics
from project.tokens import signing_keys

# Of a process's threads, one in four may hash, and two in four may wait for the bodies of requests.
# At least one in four is left for other requests.
THREADS_PER_REQUEST = 4
GRANIAN_LOG_CONFIG = Path(__file__).resolve().parent.parent / "granian.json"


def serve() -> None:
    """Migrate the database, unless it is newer, then serve with Granian, as in production.

    Variables of Granian, such as GRANIAN_HOST and GRANIAN_PORT, override the defaults.
    """
    environment = _defaults() | os.environ
    port = current_app.config["METRICS_PORT"]
    if str(port) == environment["GRANIAN_PORT"]:
        sys.exit(f"METRICS_PORT and GRANIAN_PORT are both {port}.")
    _show_migrations()
    database.upgrade()
    _prepare_keys()
    db.engine.dispose()
    if port:
        environment[metrics.DIRECTORY] = str(metrics.new_directory(f"{SERVICE_NAME}-metrics-"))
    command = [sys.executable, "-m", "granian", "--interface", "wsgi", "--factory"]
    threads = THREADS_PER_REQUEST * current_app.config["GRANIAN_BLOCKING_THREADS"]
    command += ["--blocking-threads", str(threads)]
    os.execve(sys.executable, [*command, "project:create_server"], environment)


def version() -> None:
    """Print the version of the service."""
    print(VERSION)


def _show_migrations() -> None:
    """Log each migration, and each long step of one, as it begins."""
    handler = logging.StreamHandler()
    if not current_app.debug:
        handler.setFormatter(logs.GranianFormatter())
    # Nothing about a database that is up to date.
    handler.addFilter(lambda record: not record.msg.startswith(("Context impl", "Will assume")))
    logger = logging.getLogger("alembic.runtime.migration")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _prepare_keys() -> None:
    """With ISSUER, make the first key if there is none; exit if the key cannot be decrypted."""
    if current_app.config["ISSUER"]:
        try:
            signing_keys.signing_key()
        except encryption.DecryptionFailed:
            sys.exit(
                "No key of ENCRYPTION_KEYS decrypts the key that signs tokens. Add the one that"
                " does, or replace the key that signs: python manage.py rotate_keys --now."
            )
        db.session.commit()


def _defaults() -> dict[str, str]:
    """Return the settings of Granian that hold where its variables are not set."""
    config = current_app.config
    defaults = {
        "GRANIAN_PORT": "5000",
        "GRANIAN_HTTP": "1",
        "GRANIAN_WORKERS": str(config["GRANIAN_WORKERS"]),
        "GRANIAN_WEBSOCKETS": "false",
        "GRANIAN_LOG_LEVEL": config["LOG_LEVEL"].lower(),
        "GRANIAN_RESPAWN_FAILED_WORKERS": "true",
        "GRANIAN_WORKERS_KILL_TIMEOUT": "20",  # seconds for requests in flight to finish
    }
    if not current_app.debug:
        defaults["GRANIAN_LOG_CONFIG"] = str(GRANIAN_LOG_CONFIG)
    return defaults
