"""What both services use: wire shapes, errors, discovery, the database, the runner. Imports no service."""

__version__ = "1.0.0"
