"""From an alarm to a verdict: replay and attribution."""
