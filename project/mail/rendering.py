"""Emails rendered from templates (Jinja): a subject, a text and an HTML part.

There are two templates for each kind of email, in the folder of a language: `<kind>.txt`, which
also sets `subject`, and `<kind>.html`. The folder MAIL_TEMPLATES has the same form, and its files
replace those of the service. A template that a language does not have is taken from English.
"""

from collections.abc import Sequence
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from pathlib import Path
from typing import Any, NamedTuple

from flask import Flask, current_app
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from sqlalchemy import Row

from project.config import SERVICE_NAME
from project.lib.app_state import AppState
from project.mail.transport import Rejected

TEMPLATES = Path(__file__).with_name("templates")
DEFAULT_LANGUAGE = "en"
MAX_LANGUAGE_LENGTH = 16  # characters, of the name of a folder
MAX_LINE = 998  # characters, RFC 5322, 2.1.1
POLICY = SMTP.clone(cte_type="7bit")  # for servers without 8BITMIME (RFC 6152)


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


def service_name() -> str:
    """Return what users call the service: the name in MAIL_FROM, or its domain."""
    name, sender = parseaddr(current_app.config["MAIL_FROM"] or SERVICE_NAME)
    return name or sender.rpartition("@")[2]


def render(mail: Row[Any], **values: Any) -> EmailMessage:
    """Return a row of the outbox as a message to its address, with `values` for the templates.

    The Message-ID is the same each time, so that a mail server can recognize a repetition. Only
    the validated address comes from the row, and `EmailMessage` refuses line breaks in headers.
    Raise Rejected if the address cannot be written in a header.
    """
    name, sender = parseaddr(current_app.config["MAIL_FROM"])
    domain = sender.rpartition("@")[2]
    text, html = _template(mail, "txt"), _template(mail, "html")
    values |= {
        "service": service_name(),
        "language": str(html.name).partition("/")[0],
        "time": mail.created_at.strftime("%Y-%m-%d %H:%M UTC"),
        "parameters": mail.parameters,
    }
    plain = text.make_module(values)
    message = EmailMessage(POLICY)
    message["From"] = Address(name, addr_spec=sender)
    message["To"] = _recipient(mail.address)
    message["Subject"] = " ".join(str(plain.subject).split())
    message["Date"] = format_datetime(mail.created_at)
    message["Message-ID"] = f"<{mail.created_at.timestamp():.6f}.{mail.id}@{domain}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no automatic replies
    part = str(plain).strip() + "\n"
    message.set_content(part, cte=_encoding(part))
    part = html.render(values)
    message.add_alternative(part, subtype="html", cte=_encoding(part))
    return message


def _recipient(address: str) -> Address:
    try:
        return Address(addr_spec=address)
    except (ValueError, MessageError):
        raise Rejected("the address cannot be written in a header (RFC 5322, 3.4.1)") from None


def _encoding(text: str) -> str | None:
    """Return "7bit" for a text that can be sent as it is, so that links in files are readable."""
    short = all(len(line) <= MAX_LINE for line in text.splitlines())
    return "7bit" if short and text.isascii() else None


def _template(mail: Row[Any], extension: str) -> Any:
    name = f"{mail.kind}.{extension}"
    names = [f"{language}/{name}" for language in (mail.language, DEFAULT_LANGUAGE)]
    return _templates.get().environment.select_template(names)
