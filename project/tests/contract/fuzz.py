"""Hold the running service against the document of its API: python -m project.tests.fuzz --help.

Schemathesis makes up requests that the document allows, and others that it does not, and looks for
answers that the document does not have: another status, another shape, no JSON, a 5xx.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from project.tests import scratch

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance,unsupported_method"
)
# They end the session with whose token everything is asked, so they come last.
ENDING = ("logout_user_get", "logout_user_post")


def fuzz(service: scratch.Service, examples: int, token: str, *choice: str) -> tuple[int, int]:
    """Run Schemathesis, and return its exit code and how many cases it made up."""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run"),
        f"http://127.0.0.1:{service.port}/docs/openapi.json",
        *("--checks", CHECKS, "--max-examples", str(examples), "--seed", "1"),
        *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color"),
        *("--warnings", "off", "--header", f"Authorization: Bearer {token}", *choice),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(result.stdout)
    made = re.search(r"(\d+) generated", result.stdout)
    return result.returncode, int(made[1]) if made else 0


def main() -> int:
    """Return 0 when every answer was one that the document has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--examples", type=int, default=25, help="at most so many for each operation and kind"
    )
    examples = parser.parse_args().examples
    settings = {"API_DOCS": "1", "RATE_LIMITS": "0"}
    with scratch.database() as url, scratch.Service(url, **settings) as service:
        admin = ("create_admin", "root", "root@test.com")
        environment = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url,
            "SECRET_KEY": os.urandom(32).hex(),
        }
        made = scratch.manage(*admin, stdin="correct horse battery\n", **environment)
        if made.returncode:
            sys.exit(made.stderr)
        credentials = {"email": "root@test.com", "password": "correct horse battery"}
        _, pair, _ = service.request("POST", "/auth/login", credentials)
        outcomes = [
            fuzz(
                service,
                examples,
                pair["auth_token"],
                *(word for name in ENDING for word in ("--exclude-operation-id", name)),
            ),
            fuzz(
                service,
                examples,
                pair["auth_token"],
                *(word for name in ENDING for word in ("--include-operation-id", name)),
            ),
        ]
        status, _, _ = service.request("GET", "/ping")
    print(f"{sum(cases for _, cases in outcomes):,} cases")
    # Had Schemathesis not run at all, it would have found nothing.
    good = status == 200 and all(code == 0 and cases for code, cases in outcomes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
