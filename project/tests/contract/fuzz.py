"""Test the running service against its API document with Schemathesis.

Usage: python -m project.tests.contract.fuzz --help.

Schemathesis generates requests that the document allows and requests that it does not, with all
its checks in all its phases. The findings that are intended are in schemathesis.toml.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from project.tests import scratch
from project.tests.api.oauth_case import ISSUER, basic, create_client

# Which findings are intended, and why.
CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
# These end the session whose token every request uses, so they are tested last.
ENDING = ("logout_user_get", "logout_user_post")


def fuzz(
    service: scratch.Service, examples: int, seed: str, authorization: str, *choice: str
) -> tuple[int, int]:
    """Run Schemathesis; return its exit code and the number of generated cases."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("--config-file", str(CONFIGURATION), "run"),
        f"http://127.0.0.1:{service.port}/docs/openapi.json",
        # Without --checks, all are enabled that the configuration does not disable.
        *("--max-examples", str(examples), "--seed", seed),
        *("--phases", "examples,coverage,fuzzing,stateful"),
        *("--continue-on-failure", "--no-color"),
        *("--warnings", "off", "--header", f"Authorization: {authorization}", *choice),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(result.stdout)
    made = re.search(r"(\d+) generated", result.stdout)
    return result.returncode, int(made[1]) if made else 0


def main() -> int:
    """Return 0 when the document has every response."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--examples", type=int, default=25, help="at most so many for each operation and kind"
    )
    parser.add_argument("--seed", default="1", help="another seed sends other requests")
    arguments = parser.parse_args()
    settings = {
        "API_DOCS": "1",
        "RATE_LIMITS": "0",
        "SMTP_URL": "smtp://127.0.0.1:1",
        "MAIL_FROM": "users@app.example",
        "LINK_BASE_URL": "https://app.example",
        "MAIL_SENDER": "0",
        "ISSUER": ISSUER,
        "ENCRYPTION_KEYS": os.urandom(32).hex(),
    }
    with scratch.database() as url, scratch.Service(url, **settings) as service:
        admin = ("create_admin", "root", "root@test.com")
        environment = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url,
            "SECRET_KEY": os.urandom(32).hex(),
            "ISSUER": ISSUER,
            "ENCRYPTION_KEYS": settings["ENCRYPTION_KEYS"],
        }
        made = scratch.manage(*admin, stdin="correct horse battery\n", **environment)
        if made.returncode:
            sys.exit(made.stderr)
        credentials = {"email": "root@test.com", "password": "correct horse battery"}
        _, pair, _ = service.request("POST", "/auth/login", credentials)
        user = f"Bearer {pair['auth_token']}"
        ending, others = (
            [word for name in ENDING for word in (option, name)]
            for option in ("--include-operation-id", "--exclude-operation-id")
        )
        client = basic("orders", create_client("orders", ISSUER, **environment))
        how = service, arguments.examples, arguments.seed
        outcomes = [
            fuzz(*how, client["Authorization"], "--include-tag", "oauth"),
            fuzz(*how, user, "--exclude-tag", "oauth", *others),
            fuzz(*how, user, *ending),
        ]
        status, _, _ = service.request("GET", "/ping")
    print(f"{sum(cases for _, cases in outcomes):,} cases")
    # Without a single case Schemathesis has not run.
    good = status == 200 and all(code == 0 and cases for code, cases in outcomes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
