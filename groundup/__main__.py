"""`python -m groundup` is `groundup`."""

from groundup.cli.main import main

if __name__ == "__main__":
    main()
