"""The detector's rules: each a pure function from a view of the job to findings."""
