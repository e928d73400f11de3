r"""Does the score of ``train.py --minutes`` agree with the Fréchet distance?

    python -m benchmarks.score_agreement --nfe=3,5

For both included networks: solvers of benchmarks/learned_solvers_<dataset_name>.jsonl whose table
or settings are in the file, so that nothing is trained. Their FID* and second FID* are read from
there (seeds 0-999 or 0-4999); the score is measured on 64 samples of other seeds. Prints the rank
correlations (Spearman) between score and both distances, and which place in both the solver with
the least score has.
"""

import click
import torch
from scipy.stats import spearmanr

from benchmarks.demo_settings import Bench
from benchmarks.learned_solvers import TableSolver
from benchmarks.report_learned_solvers import read
from evaluation.detectors import EMBEDDED
from torch_utils.cli import Command
from training.sample_loss import SampleScore

SAMPLES, CHUNK = 64, 32


def solvers_of(rows, nfe, net):
    """(method, row, arguments of ``sample``) of each method whose solver is in its row."""
    found = {}
    for row in rows:
        known = row["part"] == "main" and row["nfe"] == nfe and row["seed"] in (0, None) and row["current"]
        table = row.get("table") or {}
        if not known or row["method"] in found:
            continue
        if row["method"].startswith("plain"):
            found[row["method"]] = (row, row["settings"])
        elif "substeps" in table and not table.get("heads") and "spatial" not in row["method"]:
            found[row["method"]] = (row, {"solver": "span", "predictor": TableSolver(table, net)})
    return [(method, *entry) for method, entry in found.items()]


@click.command(cls=Command)
@click.option("--nfe", default="3,5", show_default=True)
@torch.no_grad()
def main(nfe):
    """Compares the score of train.py --minutes with the Fréchet distance."""
    for dataset_name in EMBEDDED:
        bench, rows = Bench(dataset_name, SAMPLES, batch=CHUNK), read(dataset_name)
        score, reference = SampleScore(bench.net, True), bench.converged()
        for number in map(int, nfe.split(",")):
            scores, distances = [], {"fid": [], "fid2": []}
            for method, row, settings in solvers_of(rows, number, bench.net):
                x, _ = bench.solve(**settings)
                parts = zip(x.split(CHUNK), reference.split(CHUNK), strict=True)
                scores.append(float(torch.cat([score(*part, {}) for part in parts]).mean()))
                print(
                    f"  {method:24s} score {scores[-1]:.4f} FID* {row['fid']:.3f} second {row['fid2']:.3f}", flush=True
                )
                for name, values in distances.items():
                    values.append(row[name])
            for name, values in distances.items():
                place = 1 + sorted(values).index(values[scores.index(min(scores))])
                print(
                    f"{dataset_name}, {number} evaluations, {len(scores)} solvers: rank correlation with {name}"
                    f" {spearmanr(scores, values).statistic:.2f}; the best score has place {place}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
