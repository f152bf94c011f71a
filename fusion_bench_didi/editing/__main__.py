"""``python -m fusion_bench_didi.editing``."""

from .command import main

if __name__ == "__main__":
    main()
