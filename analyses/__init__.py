"""One script a question: each computes, and leaves its result in `analyses/results/`."""
