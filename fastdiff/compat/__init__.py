"""Drop-in interfaces of the projects that diffusion code is written for; each is imported only when asked for."""
