"""Triton kernels with their plain-PyTorch references; installed and imported as `fastdiff.kernels`."""

if __name__ != "fastdiff.kernels":
    raise ImportError(
        f"this folder is the package 'fastdiff.kernels', but it was imported as {__name__!r}: "
        "install the project with 'pip install -e .' and import fastdiff.kernels"
    )
