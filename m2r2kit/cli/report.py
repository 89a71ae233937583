"""`m2r2kit report`: the table of the paper's figures and ours, from the records."""

import json
import shutil

from ..bench.claims import VERDICTS, table
from ..bench.report import as_markdown, as_text


def arguments(parser):
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")


def run(args) -> int:
    """Print the table."""
    rows = table()
    if args.json:
        print(json.dumps(rows, indent=1))
    elif args.markdown:
        print(as_markdown(rows))
    else:
        print(as_text(min(140, shutil.get_terminal_size((100, 24)).columns), rows))
        counts = [f"{sum(row['verdict'] == v for row in rows)} {v}" for v in VERDICTS]
        print(f"\nreport: {', '.join(counts)}")
    return 0
