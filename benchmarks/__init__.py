"""Benchmarks of fastdiff against plain PyTorch and its peers; results/ holds what was measured, by GPU and date."""
