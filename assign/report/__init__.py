"""Tables for the terminal, pictures, and a page for a browser."""
