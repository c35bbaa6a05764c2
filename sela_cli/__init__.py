"""SeLa: self-labelling of image collections by balanced clustering."""

__version__ = "0.1.0"
