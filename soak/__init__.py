"""What must not go wrong, tried often: processes killed, files damaged, compilers broken.

Each promise has one or more trials (`soak.trial`), which `make test` runs a few times and `make soak` as often as the
promise says. A trial's attempts are numbered, and the number is the seed of all that is random in one.
"""
