"""Tables and plans in pure Python. Nothing here imports torch.

========================  ============================================================
``keys``                  The only parser of the names of tensors.
``table``                 TensorTable: every tensor of a step, and its schedule.
``entry``                 The format of one tensor.
``plan``                  The plan and its file.
``recipes``               Which formats a search may choose from.
``space``                 What a search may choose.
``measured``              What was measured for it.
``grouping``              Tensors that share a decision.
``ops``                   The table of facts about operators.
``precision``             Results that stay in float32.
``compute_dtype``         The dtype in which each operator computes.
``persistent_state``      What is kept between steps.
``optimizer_backends``    Which library keeps it.
``noise_table``           Measured noise.
``latency_table``         Measured times.
``quality``               Which of several plans are better.
========================  ============================================================
"""
