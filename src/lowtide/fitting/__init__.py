"""Budgets at work: plans for anything that can be planned for, put to work and kept to."""
