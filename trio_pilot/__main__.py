"""`python -m trio_pilot` is the `trio-pilot` command."""

from trio_pilot.cli import main

if __name__ == "__main__":
    main()
