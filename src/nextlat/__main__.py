"""`python -m nextlat`, the same as the command `nextlat`."""

from nextlat.cli import main

if __name__ == "__main__":
    main()
