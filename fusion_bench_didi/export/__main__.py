"""``python -m fusion_bench_didi.export``."""

from .command import main

if __name__ == "__main__":
    main()
