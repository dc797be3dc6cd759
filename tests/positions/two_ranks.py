"""Run by `accelerate launch` in two processes: a little training; each rank writes down the ids that it was given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.positions.test_training import DOCUMENTS, trained


def main(folder: Path) -> None:
    trainer = trained(folder, steps=3, report="cream")
    report = {
        "world": trainer.args.world_size,
        "seen": trainer.seen,
        "documents": len(DOCUMENTS),
        "parameters": [parameter.sum().item() for parameter in trainer.model.parameters()],
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
