"""Train tasks under plans, measure and compare the trainings, and store them in files.

=================  ============================================================
``loop``           Train a task.
``options``        How.
``history``        Its steps and epochs.
``checkpoints``    Resumable files.
``weights``        Weights to start from.
``compare``        Train several plans.
``comparison``     Their results, and the file of them.
``tuning``         Search by training, with Optuna.
``trials``         One training of a study.
``database``       Where a study lives.
=================  ============================================================
"""
