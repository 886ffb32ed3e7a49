"""Makes `python -m revtrain` and `accelerate launch -m revtrain` work."""

from revtrain.cli import main

if __name__ == "__main__":
    main()
