"""The tables of a registry, as queries name them. What makes and changes them is in `migrations/`."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Float, ForeignKey, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

# The manifest says all. The other columns repeat what is searched for, and are compared with it on every load.
prompts = Table(
    "prompts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("created", String(20), nullable=False),
    Column("method", String(200), nullable=False),
    Column("task", String(16), nullable=False),
    Column("encoder", String(200), nullable=False),
    Column("fingerprint", String(200), nullable=False),
    Column("private", Boolean, nullable=False),
    Column("simulated", Boolean, nullable=False),
    Column("epsilon", Float(53)),
    Column("manifest", LargeBinary, nullable=False),
    Column("signature", String(100), nullable=False),
    Column("public_key", String(64), nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("prompt", ForeignKey("prompts.id"), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

withdrawals = Table(
    "withdrawals",
    metadata,
    Column("prompt", ForeignKey("prompts.id"), primary_key=True),
    Column("at", String(20), nullable=False),
    Column("reason", Text, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", String(100), nullable=False),
    Column("per_minute", Integer),
    Column("per_day", Integer),
    Column("created", String(20), nullable=False),
    Column("revoked", String(20)),
)

asked = Table(
    "asked",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("pictures", Integer, nullable=False),
)
