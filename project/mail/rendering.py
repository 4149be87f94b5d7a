"""Emails rendered from templates (Jinja): a subject, a text and an HTML part.

There are two templates for each kind of email, in the folder of a language: `<kind>.txt`, which
also sets `subject`, and `<kind>.html`. The folder MAIL_TEMPLATES has the same form, and its files
replace those of the service. A template that a language does not have is taken from English.
"""

from collections.abc import Sequence
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from pathlib import Path
from typing import Any, NamedTuple

from flask import Flask, current_app
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from sqlalchemy import Row

from project.lib.app_state import AppState

TEMPLATES = Path(__file__).with_name("templates")
DEFAULT_LANGUAGE = "en"
MAX_LANGUAGE_LENGTH = 16  # characters, of the name of a folder


class Templates(NamedTuple):
    """The templates of the service and of its operator."""

    environment: Environment
    languages: Sequence[str]  # the default language first


_templates = AppState[Templates]("mail_templates")


def init_app(app: Flask) -> None:
    """Give `app` the templates of the service and of its operator."""
    folders = [folder for folder in (app.config["MAIL_TEMPLATES"], TEMPLATES) if folder]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = {Path(name).parts[0] for name in environment.list_templates() if "/" in name}
    others = (name for name in found if len(name) <= MAX_LANGUAGE_LENGTH)
    _templates.set(
        app,
        Templates(environment, sorted(others, key=lambda name: (name != DEFAULT_LANGUAGE, name))),
    )


def languages() -> Sequence[str]:
    """Return the languages that there are templates in, the default language first."""
    return _templates.get().languages


def render(mail: Row[Any], **values: Any) -> EmailMessage:
    """Return a row of the outbox as a message to its address, with `values` for the templates.

    The Message-ID is the same each time, so that a mail server can recognize a repetition. Only
    the validated address comes from the row, and `EmailMessage` refuses line breaks in headers.
    """
    config = current_app.config
    name, sender = parseaddr(config["MAIL_FROM"])
    domain = sender.rpartition("@")[2]
    values |= {
        "service": name or domain,
        "language": mail.language,
        "time": mail.created_at.strftime("%Y-%m-%d %H:%M UTC"),
        "parameters": mail.parameters,
    }
    text = _template(mail, "txt").make_module(values)
    message = EmailMessage(SMTP)
    message["From"] = Address(name, addr_spec=sender)
    message["To"] = Address(addr_spec=mail.address)
    message["Subject"] = " ".join(str(text.subject).split())
    message["Date"] = format_datetime(mail.created_at)
    message["Message-ID"] = f"<{mail.created_at.timestamp():.6f}.{mail.id}@{domain}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no automatic replies
    message.set_content(str(text).strip() + "\n")
    message.add_alternative(_template(mail, "html").render(values), subtype="html")
    return message


def _template(mail: Row[Any], extension: str) -> Any:
    name = f"{mail.kind}.{extension}"
    names = [f"{language}/{name}" for language in (mail.language, DEFAULT_LANGUAGE)]
    return _templates.get().environment.select_template(names)
