"""What a comparison shows while it runs, and what goes to a file instead."""

import logging
import sys

from fusion_bench_didi.programs.progress import quiet


def test_all_chatter_goes_to_a_file(tmp_path, capfd):
    """Printed, logged by the root, and by a library's logger with a handler of its own; afterwards all is as before."""
    library = logging.getLogger("a_library_with_its_own_handler")
    library.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    library.addHandler(handler)
    try:
        with quiet(tmp_path / "chatter.log"):
            print("printed")
            print("to standard error", file=sys.stderr)
            library.warning("logged")
        library.warning("afterwards")
    finally:
        library.removeHandler(handler)
    kept = (tmp_path / "chatter.log").read_text().splitlines()
    assert kept == ["printed", "to standard error", "logged"]
    out, err = capfd.readouterr()
    assert not out and err.splitlines() == ["afterwards"]
