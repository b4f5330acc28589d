"""Does the model learn: loss of `small` on the default corpus, and on random bytes, where there is nothing to learn."""

import os
import tempfile
from pathlib import Path

from benchmarks._figures import Figure, document
from benchmarks._runs import options, runs

#: Nats a byte that 300 steps must reach, and that random bytes must not fall below (their entropy is ln 256 = 5.545).
LEARNT = 3.0
NOT_LEARNT = 5.4
RANDOM_BYTES = 4 << 20


def main() -> None:
    """Run and print one JSON document."""
    steps = 20 if options(__doc__).quick else 300
    common = ["--preset", "small", "--nodes", "2", "--spares", "0", "--seed", "1", "--steps", str(steps)]
    with tempfile.TemporaryDirectory(prefix="assay-random-") as folder:
        noise = Path(folder) / "random.bin"
        noise.write_bytes(os.urandom(RANDOM_BYTES))
        results = runs({"corpus": common, "random bytes": [*common, "--corpus", str(noise)]})
    corpus, random = results["corpus"], results["random bytes"]
    whole = steps == 300
    figures = [
        Figure("loss at step 1, default corpus", corpus["loss_first"], "nats/byte", "lower"),
        Figure(
            f"loss at step {steps}, default corpus",
            corpus["loss_last"],
            "nats/byte",
            "lower",
            target=LEARNT if whole else None,
            samples=steps,
        ),
        Figure(
            f"loss at step {steps}, random bytes",
            random["loss_last"],
            "nats/byte",
            "higher",
            target=NOT_LEARNT,
            samples=steps,
        ),
        Figure("speed, sensors on, 2 ranks of 1 thread", corpus["tokens_per_s"], "tokens/s", "higher"),
        Figure(
            "incidents in these clean steps",
            len(corpus["incidents"]) + len(random["incidents"]),
            "incidents",
            "lower",
            target=0,
            samples=2 * steps,
        ),
    ]
    print(document("learning", figures, threads=1))


if __name__ == "__main__":
    main()
