"""Choose a plan by arithmetic alone: a workload, rates and budgets go in, a plan and its reasons come out."""
