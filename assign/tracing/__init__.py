"""Capture the training step of a model as a table of tensors.

======================  ============================================================
``tracer``              The entry point, :func:`assign.trace`.
``step``                The table, with the model, the batch and the loss.
``capture``             The step as one graph, captured by Dynamo.
``recording``           The step as several graphs, where its code needs values.
``pieces``              These graphs, and what they pass on to each other.
``deferred``            Tensors whose values are not known yet.
``pending``             The piece that is being recorded.
``torch_functions``     Functions of torch that need values.
``user_code``           Lines of the user's code.
``sizes``               Sizes that are numbers in tensors.
``kept_state``          Leave the model unchanged.
``functionalize``       Remove in-place operators.
``tensor_sites``        Name every tensor, for tracer and executor.
``layout``              Order of nodes.
``probes``              Find tensors in the backward pass.
``joint``               Facts about operators of joint graphs.
``workspace``           Scratch memory of kernels.
``nonfinite``           Activations that hold infinities.
``needs``               Tensors that must keep their precision.
``constants``           Numbers in graphs that 16 bits cannot hold.
``optimizer_states``    States of an optimizer.
``allocations``         Count bytes of tensors without data.
``measuring``           Measure bytes with the profiler.
``loaded``              Dtypes of the model as it was loaded.
``heap``                Return freed memory to the system.
======================  ============================================================
"""
