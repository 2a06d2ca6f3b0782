"""All commands, registered with the application."""

from assign.cli import inspect, report, search, train, tune, verify
from assign.cli.shell import app

__all__ = ["app", "inspect", "report", "search", "train", "tune", "verify"]
