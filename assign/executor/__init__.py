"""Run a model under a plan.

=======================  ============================================================
``apply``                The entry points.
``pipeline``             Runs the graph ``passes`` in order, and logs them.
``context``              What the passes need to know.
``backends``             Eager, and compiled by Inductor.
``fit``                  Does the plan fit the captured step?
``parameter_storage``    Store parameters as the plan says.
``methods``              Methods of a planned model.
``unused``               Parameters without a gradient.
``sparse``               Sparse gradients.
``compiled_memory``      Peak of a compiled step.
``latency``              Seconds of each choice.
=======================  ============================================================
"""
