"""Run by Alembic, in the transaction of the connection that `sordino.serving.database` gives it."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
