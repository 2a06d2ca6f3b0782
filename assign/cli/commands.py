"""All commands, registered with the application."""

from assign.cli import looking, reporting, searching, studies, training, verifying
from assign.cli.shell import app

__all__ = ["app", "looking", "reporting", "searching", "studies", "training", "verifying"]
