"""Tables, formats, predictions and plans in pure Python. Nothing here imports torch."""
