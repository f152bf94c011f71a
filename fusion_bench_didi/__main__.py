"""``python -m fusion_bench_didi``: the same as the command ``didi``."""

from .cli import main

if __name__ == "__main__":
    main()
