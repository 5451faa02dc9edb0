"""`python -m trio_pilot` is the `trio-pilot` command."""

from trio_pilot.cli.main import main

if __name__ == "__main__":
    main()
