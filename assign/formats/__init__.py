"""Number formats as rows of data, and facts about dtypes. Nothing here imports torch.

=============  ============================================================
``rows``       Every format.
``posits``     The layout of posits.
``parsing``    The parser of their names.
``dtypes``     Bytes and formats of torch's dtypes.
=============  ============================================================
"""

from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, Format

__all__ = ["FORMATS", "Format", "parse_format"]
