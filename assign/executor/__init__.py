"""Run a model under a plan.

=======================  ============================================================
``apply``                The entry points.
``pipeline``             Run the graph ``passes`` in order, and log them.
``context``              Information that the passes need.
``backends``             Eager, and compiled by Inductor.
``fit``                  Check the plan against the captured step.
``parameter_storage``    Store parameters in the dtypes of the plan.
``micro_batches``        Run a batch in parts.
``methods``              Methods of a planned model.
``unused``               Parameters without a gradient.
``sparse``               Sparse gradients.
``compiled_memory``      Peak memory of a compiled step.
``latency``              Seconds of each candidate.
=======================  ============================================================
"""
