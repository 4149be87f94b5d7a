"""The command that writes the API document: openapi."""

import os
import sys
from pathlib import Path

import orjson
from flask import current_app

from project.api.openapi import describe


def openapi(file: str, origin: str = "") -> None:
    """Write the API document (OpenAPI 3.1), for the settings in force, without a running service.

    The file - is standard output. An origin, such as https://users.example.com, becomes the default
    in `servers`, for tools that need an absolute URL.
    """
    document = describe(current_app, origin)  # type: ignore[arg-type]  # a proxy of the application
    text = orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    try:
        if file == "-":
            with os.fdopen(os.dup(1), "wb") as output:
                output.write(text)
        else:
            Path(file).write_bytes(text)
    except OSError as error:
        sys.exit(f"{file} cannot be written: {error.strerror}")
