"""How a registry's tables came about, step by step; Alembic takes an older registry to the newest step."""
