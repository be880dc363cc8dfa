"""fastdiff: every sampler is a table, and one fused kernel executes any row of it."""

__version__ = "0.1.0"
