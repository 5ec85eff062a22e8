"""`python -m vae_ray` is `vae-ray`."""

from vae_ray.cli.main import run

if __name__ == "__main__":
    run()
