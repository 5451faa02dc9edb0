"""`python -m trio_pilot` is the `trio-pilot` command."""

from trio_pilot.program import main

if __name__ == "__main__":
    main()
