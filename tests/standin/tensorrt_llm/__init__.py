"""A stand-in for NVIDIA's package, for tests only: its signatures at 0.15.0, refusing whatever those do not allow."""

__version__ = "0.15.0"
