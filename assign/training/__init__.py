"""Train tasks under plans, measure and compare the trainings, and store them in files.

=================  ============================================================
``loop``           Train a task.
``options``        Options of a training.
``history``        Steps and epochs of a training.
``checkpoints``    Resumable files.
``weights``        Weights to start from.
``compare``        Train several plans.
``comparison``     Results of several plans, and their file.
``tuning``         Search by training, with Optuna.
``trials``         One training of a study.
``database``       The database of a study.
=================  ============================================================
"""
