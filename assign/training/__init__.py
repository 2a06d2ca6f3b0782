"""Train tasks under plans, measure and compare the trainings, and keep them in files."""
