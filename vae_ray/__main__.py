"""`python -m vae_ray` is `vae-ray`."""

import sys

from vae_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
