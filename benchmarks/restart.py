"""What a kill late in a job costs: time from SIGKILL to the next committed step, and steps executed again."""

from benchmarks._figures import Figure, document
from benchmarks._runs import options, runs

#: Seconds from the kill to the next committed step.
TARGET_S = 3.0


def main() -> None:
    """Run and print one JSON document. The undisturbed job beside it must end in the same bits."""
    steps, kill = (40, 30) if options(__doc__).quick else (400, 390)
    common = ["--preset", "tiny", "--nodes", "2", "--spares", "1", "--seed", "7", "--steps", str(steps)]
    results = runs({"undisturbed": common, "killed": [*common, "--drill", f"kill@{kill}:rank=0"]})
    clean, killed = results["undisturbed"], results["killed"]
    (crash,) = killed["incidents"]
    figures = [
        Figure(f"kill at step {kill} of {steps}: recovery", crash["recovery_s"], "s", "lower", target=TARGET_S),
        Figure(f"kill at step {kill} of {steps}: detection", crash["detect_s"], "s", "lower"),
        Figure(
            "steps executed again", killed["executed_steps"] - killed["committed_steps"], "steps", "lower", target=1
        ),
        Figure(
            "same state and chain digests as undisturbed (1 yes, 0 no)",
            float((killed["state_digest"], killed["chain_digest"]) == (clean["state_digest"], clean["chain_digest"])),
            "",
            "higher",
            target=1,
        ),
    ]
    print(document("restart", figures, threads=1))


if __name__ == "__main__":
    main()
