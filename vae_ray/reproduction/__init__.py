"""Published results as entries of a registry, and what this system obtains for them: `vae-ray reproduce`."""
