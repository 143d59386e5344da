"""Pure arithmetic: a workload, rates and budgets in, a plan and its reasons out."""
