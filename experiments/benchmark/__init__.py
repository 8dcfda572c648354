"""Our speed beside what a user would pick instead, in one run."""
