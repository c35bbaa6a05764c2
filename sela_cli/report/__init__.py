"""`sela report`: contents (what the files say), figures (matplotlib), page (HTML)."""
