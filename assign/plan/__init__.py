"""What is decided, and on what: tables, formats, bytes, plans. Pure Python: nothing here imports torch."""
