"""`python -m soup_xb` is the `soupx` command; launchers such as torchrun use this form."""

from soup_xb.cli import run

if __name__ == "__main__":
    run()
