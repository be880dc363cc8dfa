"""Short programs that run as they are: python -m fastdiff.examples.own_module, and so on."""
