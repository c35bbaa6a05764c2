"""One verb per file: its options, its help, and one call into the core."""
