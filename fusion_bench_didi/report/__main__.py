"""``python -m fusion_bench_didi.report DIRECTORY``: make the report of a comparison anew."""

import argparse

from . import write_report

parser = argparse.ArgumentParser(
    prog="python -m fusion_bench_didi.report",
    description="Write tables, plots and the page of a comparison beside its comparison.json.",
)
parser.add_argument("directory", help="that holds comparison.json")
for file in write_report(parser.parse_args().directory):
    print(file)
