"""Graph passes: each edits a graph in place and returns it, ``(graph, context) -> graph``; one pass a file.

:mod:`assign.executor.pipeline` sets their order and their graphs, and can log what each of them changed.

======================  =========================================================================================
``mark``                Captured step: round every tensor and its gradient after the operator that makes it.
``pack``                Joint graph: save activations in their own format.
``accumulate``          Joint graph: sum products exactly, or rounded one by one, as the format of the result says.
``narrow_products``     Joint graph: multiply matrices in a narrow dtype that holds their elements exactly.
``reuse_grids``         Joint graph: do not round values that lie on the format's grid already.
``keep_in_backward``    Joint graph: keep restored values in the backward pass.
``fuse_scales``         Forward and backward graph: scale and round in one operator.
``inline_casts``        Graph that Inductor lowers: replace casts by torch's own operators.
``overwrite``           Graph that Inductor lowers: round in place if no other node reads the value.
======================  =========================================================================================
"""
