"""False alarms of a whole job: clean steps of `small` from the first on, in every precision, sensors on."""

from benchmarks._figures import Figure, document
from benchmarks._runs import options, runs

PRECISIONS = ("fp32", "bf16", "fp8")


def main() -> None:
    """Run and print one JSON document. The control: at a thousandth of the tolerance the same steps do alarm."""
    steps = 10 if options(__doc__).quick else 200
    common = ["--preset", "small", "--nodes", "2", "--spares", "0", "--seed", "5"]
    jobs = {p: [*common, "--precision", p, "--steps", str(steps)] for p in PRECISIONS}
    jobs["control"] = [*common, "--steps", "3", "--tolerance-scale", "0.001"]
    results = runs(jobs)
    figures = [
        Figure(
            f"incidents, {precision}",
            len(results[precision]["incidents"]),
            "incidents",
            "lower",
            target=0,
            coverage="every linear and expert, forward and both backwards",
            samples=2 * steps,
        )
        for precision in PRECISIONS
    ]
    control = results["control"]["incidents"]
    figures.append(
        Figure("incidents at tolerance-scale 0.001 (control)", len(control), "incidents", "higher", target=1, samples=3)
    )
    print(document("false_alarms", figures, threads=1))


if __name__ == "__main__":
    main()
