"""Graph passes: each edits a graph in place and returns it, ``(graph, context) -> graph``; one pass a file.

:mod:`assign.executor.pipeline` says in which order they run, on which graph, and can log what each of them changed.

======================  =========================================================================================
``mark``                Captured step: round every tensor and its gradient behind the operator that makes it.
``pack``                Joint graph: save activations in their own format.
``narrow_products``     Joint graph: multiply matrices in a narrow dtype that holds their elements exactly.
``reuse_grids``         Joint graph: do not round what lies on the format's grid already.
``keep_in_backward``    Joint graph: what is restored in the backward pass stays there.
``fuse_scales``         Forward and backward graph: scale and round in one operator.
``inline_casts``        Graph that Inductor lowers: casts become torch's own operators.
``overwrite``           Graph that Inductor lowers: round in place where nobody else reads the value.
======================  =========================================================================================
"""
