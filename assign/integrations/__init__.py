"""Plans in other people's training loops: one module for each library, imported only where it is installed."""
