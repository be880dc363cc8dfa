"""Triton kernels with their plain-PyTorch references; installed and imported as `fastdiff.kernels`.

From the repository root a program may find this folder under the name `kernels`, which is also that of an unrelated
package that transformers looks for. Under that name it is empty: no version, no submodules, and a message that says so.
"""

if __name__ != "fastdiff.kernels":
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(f"this folder is the package fastdiff.kernels, not {__name__!r}: it has no {name!r} here")
