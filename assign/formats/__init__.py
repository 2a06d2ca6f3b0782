"""Number formats as rows of data, and facts about dtypes. Nothing here imports torch.

=============  ============================================================
``rows``       Every format.
``posits``     The layout of posits. ``tables``: of formats that are a table of values.
``parsing``    The parser of their names.
``own``        Registration of formats from outside the package.
``dtypes``     Bytes and formats of torch's dtypes.
=============  ============================================================
"""

from assign.formats.own import register_format
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, Format

__all__ = ["FORMATS", "Format", "parse_format", "register_format"]
