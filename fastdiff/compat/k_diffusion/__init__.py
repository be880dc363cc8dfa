"""k-diffusion's interface on the fused engine.

    import fastdiff.compat.k_diffusion as K

in place of `import k_diffusion as K`: K.sampling has the sampling functions and sigmas, K.external the wrappers of
models, K.layers Karras' preconditioner. Models, training and evaluation of the original are not part of it.
"""

from fastdiff.compat.k_diffusion import external, layers, sampling

__all__ = ["external", "layers", "sampling"]
