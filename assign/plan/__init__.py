"""Tables and plans in pure Python. Nothing here imports torch.

========================  ============================================================
``keys``                  The only parser of the names of tensors.
``table``                 TensorTable: every tensor of a step, and its schedule.
``entry``                 The format of one tensor.
``plan``                  The plan and its file.
``step_options``          How a step is carried out: micro-batches.
``split``                 Split a batch into micro-batches.
``recipes``               Formats that a search may choose from, by role.
``space``                 The search space.
``measured``              Measurements for a search.
``grouping``              Tensors that share a decision.
``ops``                   The table of facts about operators.
``precision``             Results that stay in float32.
``compute_dtype``         The dtype in which each operator computes.
``persistent_state``      What is stored between steps.
``optimizer_backends``    Which library stores the optimizer states.
``noise_table``           Measured noise.
``latency_table``         Measured times.
``quality``               Comparison of plans: metrics and the Pareto front.
========================  ============================================================
"""
