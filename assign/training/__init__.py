"""A task trained under a plan, measured, kept in files, compared."""
