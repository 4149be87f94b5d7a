"""The Flask extensions, one unbound instance of each; `create_app` binds them."""

from pathlib import Path

from flask_bcrypt import Bcrypt
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase

# Constraints have the same names on every database: migrations and error handling use the names.
NAMING_CONVENTION = {
    "pk": "%(table_name)s_pkey",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}
MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"


class Base(DeclarativeBase):
    """The base class of the tables."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)


# Rows keep their values after a commit: building a response reads nothing again.
db = SQLAlchemy(model_class=Base, session_options={"expire_on_commit": False})
bcrypt = Bcrypt()
migrate = Migrate(db=db, directory=str(MIGRATIONS))
